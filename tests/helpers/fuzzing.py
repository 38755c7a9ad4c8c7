"""Damaged and hostile files: what a mutation does to good bytes, and what a reader may not do about it."""

import contextlib
import io
import json
import os
import random
import resource
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from bilevel_fast.base.errors import UserError

ROWS = os.environ.get("FUZZ_ROWS")
"""A file that gets a row of each reader that has stood all its inputs; docs/situations.md is made of it."""

EXAMPLES = int(os.environ.get("FUZZ", "300"))
"""Inputs per reader; `make fuzz` sets it to 10,000."""
_AT_ONCE = 20  # inputs to an example of hypothesis, which takes longer to draw it than a reader to read it
_ROOM = 2**31  # bytes of address space that a reader may ask for, on top of what there is

_SURPRISES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3.5, -0.5, 10**9, 10**12, 10**30, 2**63, 1e308, float("inf"), float("nan")),
    *("", "a", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[2J", "\ud800", "x" * 300, "9" * 30),
    *([], {}, [1], [[]], [None], {"a": []}, [1] * 40, ["a", "a"]),
)
_PIECES = (
    *(b"", b"\0", b"\xff", b"\n", b",", b'"', b"{", b"}", b"[", b"]", b":", b"-", b"e", b"\r\n", b"\xef\xbb\xbf"),
    *(b"null", b"NaN", b"Infinity", b"1e999", b"-1", b"99999999999999999999", b'"\\ud800"', b"../"),
    *(b"PK\x03\x04", b"\xed\xa0\x80"),
    *(b"[" * 5000, b"9" * 5000, b"a" * 140_000, b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff\xff\xff\xff\xff"),
)  # fmt: skip


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Good bytes after one to three mutations: of the JSON that they are, of what a zip holds, of the header of a
    safetensors file, or of the bytes themselves."""
    if data.startswith(b"PK") and draw.random() < 0.7:
        return _zip(data, draw)
    length = int.from_bytes(data[:8], "little")
    if data[8:9] == b"{" and length < len(data) and draw.random() < 0.7:
        header = mutated(data[8 : 8 + length], draw)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    with contextlib.suppress(ValueError, RecursionError):
        if draw.random() < 0.7:
            lines = data.decode().splitlines()
            several = len(lines) > 1 and all(line.startswith("{") for line in lines)
            number = draw.randrange(len(lines)) if several else 0
            value = json.loads(lines[number] if several else data)
            for _ in range(draw.randint(1, 3)):
                value = _other(value, draw)
            text = json.dumps(value)
            return "\n".join([*lines[:number], text, *lines[number + 1 :]] if several else [text]).encode() + b"\n"
    return _bytes(data, draw)


def _bytes(data: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + draw.choice((0, 0, 1, 1, 1, 2, 8, 100, len(data))))
        data = data[:start] + draw.choice((*_PIECES, bytes([draw.randrange(256)]), data[end : end + 20])) + data[end:]
    return data


def _zip(data: bytes, draw: random.Random) -> bytes:
    """With one member mutated, and whole as a zip."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    # most often what says how the rest is to be read
    chosen = [name for name in members if name.endswith(("data.pkl", ".npy"))]
    name = draw.choice(chosen if draw.random() < 0.7 else list(members))
    members[name] = _bytes(members[name], draw)
    with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        for each, content in members.items():
            archive.writestr(each, content)
    return out.getvalue()


def _other(value: Any, draw: random.Random) -> Any:
    """A JSON value with one value in it replaced, renamed, removed or repeated."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return draw.choice(_SURPRISES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, how = draw.choice(keys), draw.random()
    value = value.copy()
    if how < 0.75:
        value[key] = _other(value[key], draw)
    elif how < 0.85:
        del value[key]
    elif isinstance(value, list):
        value.insert(key, value[draw.choice(keys)])
    else:
        value[draw.choice(("", "a", "..", "\x1b[2J"))] = value.pop(key)
    return value


_opened: list[str] | None = None
_started: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is None:
        return
    if event == "open" and isinstance(arguments[0], str | bytes):
        _opened.append(os.fsdecode(arguments[0]))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
        _started.append(event)


sys.addaudithook(_watch)
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")} | {sys.prefix})


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Nothing outside the folder is opened (but code), nothing is started, and no more than `_ROOM` is asked for.

    What Rust and C++ open is not seen.
    """
    global _opened
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + _ROOM, before[1]))
    _opened, found = [], None
    try:
        yield
    finally:
        found, _opened = _opened, None
        resource.setrlimit(resource.RLIMIT_AS, before)
    code = (*_LIBRARIES, str(Path(__file__).parents[2]), "/proc/", "/sys/", "/dev/")
    outside = [path for path in map(os.path.realpath, found) if not path.startswith((str(folder.resolve()), *code))]
    assert not outside, f"opened {outside[0]}"
    assert not _started, f"called {_started[0]}"


def fuzz(
    make: Callable[[Path], Path],
    read: Callable[[Path], object],
    allowed: type[Exception] = UserError,
    refuses: bool = True,
) -> None:
    """Read `EXAMPLES` mutations of a file: each is read, or refused by a UserError of one line.

    Args:
        make: Writes what is good into a new folder, and returns the file to mutate.
        read: Reads the file, or the folder around it.
        allowed: What a refusal is.
        refuses: Not so for a reader that leaves out what is bad.
    """
    with tempfile.TemporaryDirectory() as name:
        path = make(Path(name))
        good = path.read_bytes()
        read(path)  # what is good is taken
        refused: list[str] = []
        tried = 0

        def try_one(number: int) -> None:
            nonlocal tried
            tried += 1
            path.write_bytes(mutated(good, random.Random(number)))
            try:
                with watched(Path(name)):
                    read(path)
            except allowed as error:
                refused.append(str(error))
            assert all(map(str.isprintable, refused[-1:]))  # so of one line

        @seed(0)
        @settings(
            max_examples=-(-EXAMPLES // _AT_ONCE), deadline=None, database=None, suppress_health_check=[*HealthCheck]
        )
        @given(st.integers(0, 2**64 - 1))
        def attempt(number: int) -> None:
            for following in range(_AT_ONCE):
                try_one(number + following)

        attempt()
        assert not refuses or len(refused) > EXAMPLES / 20, "the mutations do not reach the reader"
        if ROWS:
            append(Path(ROWS), tried, len(refused))


def append(rows: Path, tried: int, refused: int) -> None:
    """The row of the test that runs."""
    import torch

    from benchmarks.machine import describe
    from benchmarks.rows import append_rows

    case = os.environ["PYTEST_CURRENT_TEST"].split("::")[1].removesuffix(" (call)")
    row = {"suite": "fuzz", "case": case, "provider": "ours", "metric": "inputs", "unit": "files", "value": tried}
    append_rows(rows, [{**row, "refused": refused, **describe(torch.device("cpu"))}])
