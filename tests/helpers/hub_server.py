"""A server on this machine that speaks as much of the Hugging Face hub's HTTP as fetching a model takes."""

import hashlib
import importlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1", COMMIT)


class Hub:
    """Repositories by id: folders, or the code with which the hub refuses them.

    Attributes:
        asked: Paths of all requests so far, in their order.
        url: For HF_ENDPOINT.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Path | str] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self) -> list[str]:
        """Files that were sent, by their names in their repository."""
        return sorted({path.partition(f"/resolve/{COMMIT}/")[2] for path in self.asked if "/resolve/" in path})

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked += [path] if body else []
        owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/", 4)
        kind, revision, *file = rest or ("revision", "main")
        found = self.repositories.get(f"{owner}/{name}", "RepoNotFound")
        if isinstance(found, Path) and revision not in REVISIONS:
            found = "RevisionNotFound"
        if isinstance(found, str):
            return self._send(request, 403 if found == "GatedRepo" else 404, b"{}", body, {"X-Error-Code": found})
        held = {file.relative_to(found).as_posix(): file for file in sorted(found.rglob("*")) if file.is_file()}
        if kind == "revision":
            siblings = [{"rfilename": name} for name in held]
            said = json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings})
            return self._send(request, 200, said.encode(), body)
        if kind == "tree":
            rows = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _oid(file)}
                for name, file in held.items()
            ]
            return self._send(request, 200, json.dumps(rows).encode(), body)
        assert kind == "resolve", path
        if file[0] not in held:
            return self._send(request, 404, b"", body, {"X-Error-Code": "EntryNotFound"})
        data = held[file[0]]
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT}
        return self._send(request, 200, data.read_bytes(), body, headers)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        data: bytes,
        body: bool,
        headers: dict[str, str] | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            request.wfile.write(data)


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def environment(**settings: str) -> Iterator[None]:
    """Environment variables of huggingface_hub, which reads them when it is imported: here it reads them again."""
    import huggingface_hub.constants as constants

    from bilevel_fast.models import hub

    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in settings.items():
            patch.setenv(name, value)
        importlib.reload(constants)
        hub._fetched.cache_clear()
        try:
            yield
        finally:
            hub._fetched.cache_clear()
    importlib.reload(constants)
