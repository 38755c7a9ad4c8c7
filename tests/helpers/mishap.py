"""What can happen to a command while it writes, at a place that is counted and not timed: the same each time.

What it writes below a folder is seen as events: a file opened to be written to, a folder made, a rename, a deletion,
and `fsync`, behind which what was written stands on the disk. A fault comes before the n-th of them. Python's audit
hooks see them in every thread and library; what C++ and Rust open is not seen.
"""

import errno
import os
import resource
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_TAKES_ROOM = ("open", "os.mkdir", "fsync")
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


@dataclass(frozen=True)
class Fault:
    """What happens to a process.

    Attributes:
        root: Events are of files and folders below.
        events: A file elsewhere that gets a line for each.
        kind: `kill` is SIGKILL before event `at`; `tear` kills when a file grows beyond `at` bytes, and leaves so many;
            `full` is a disk with no room from event `at` on; `forbidden` is one that must not be written to at all.
        at: From 1.
    """

    root: Path
    events: Path
    kind: Literal["none", "kill", "tear", "full", "forbidden"] = "none"
    at: int = 0

    def install(self) -> None:
        """In this process, for the rest of its life."""
        if self.kind == "tear":
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.at, self.at))
        log = os.open(self.events, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        lock, root, seen = threading.Lock(), str(self.root), 0

        def happens(event: str, path: str) -> None:
            nonlocal seen
            with lock:
                seen += 1
                number = seen
                os.write(log, f"{event} {path.removeprefix(root)}\n".encode())
            if self.kind == "kill" and number == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "full" and number >= self.at and event in _TAKES_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([] if event == "fsync" else [path]))
            if self.kind == "forbidden" and event != "fsync":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in ("open", *_CHANGES):
                return
            path, flags = arguments[0], arguments[-1]
            good = isinstance(path, str | bytes | os.PathLike)
            if event == "open":
                good = good and isinstance(flags, int) and flags & _WRITING
            # shutil.rmtree names files relative to a descriptor
            if good and (f"{(name := os.fsdecode(path))}/".startswith(f"{root}/") or "/" not in name):
                happens(event, name)

        def fsync(number: int, real: Any = os.fsync) -> None:
            if (name := os.readlink(f"/proc/self/fd/{number}")).startswith(f"{root}/"):
                happens("fsync", name)
            real(number)

        os.fsync = fsync
        sys.addaudithook(watch)

    def seen(self) -> list[str]:
        """The events, in their order."""
        return self.events.read_text().splitlines() if self.events.exists() else []
