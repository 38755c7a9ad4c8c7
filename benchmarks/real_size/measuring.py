"""A process as a user starts it: how long it took, and what it held of the machine's memory at its peak.

    peak    `VmHWM`: all that was in memory for it, pages of mapped files included, which the system takes back
    held    `RssAnon` at its highest: what it had allocated and touched, which nobody can take back

Both are the process's own, seen from outside, many times a second.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.005
"""Seconds between two looks."""


@dataclass(frozen=True)
class Taken:
    """What a process took."""

    code: int
    """Exit status; negative after a signal."""
    seconds: float
    peak: int
    """Bytes."""
    held: int
    """Bytes."""

    def then(self, later: "Taken") -> "Taken":
        """Both processes, one after the other, as one: the time of both, the larger of the peaks."""
        seconds = self.seconds + later.seconds
        return Taken(later.code, seconds, max(self.peak, later.peak), max(self.held, later.held))


def run(
    arguments: Sequence[str],
    cwd: Path,
    log: Path,
    longest: float,
    kill: Callable[[], bool] = lambda: False,
    env: Mapping[str, str] | None = None,
) -> Taken:
    """`python -m ARGUMENTS` to its end, or to the first moment at which `kill` says so: then it gets a SIGKILL.

    Args:
        arguments: Module and flags.
        cwd: Where it runs.
        log: Standard output and standard error are appended to this file.
        longest: Seconds after which it is killed as well.
        kill: Asked again and again.
        env: In place of this process's environment.
    """
    start, peak, held = time.perf_counter(), 0, 0
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=cwd, stdout=out, stderr=subprocess.STDOUT, env=env
        )
        try:
            while process.poll() is None:
                found = status(process.pid)
                peak, held = max(peak, found.get("VmHWM", 0)), max(held, found.get("RssAnon", 0))
                if kill() or time.perf_counter() - start > longest:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    break
                time.sleep(EVERY)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return Taken(process.returncode, time.perf_counter() - start, peak, held)


def status(pid: int | str = "self") -> dict[str, int]:
    """The fields of `/proc/PID/status` that are sizes, in bytes; none if there is no such process any more."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: 1024 * int(value.split()[0]) for name, value in pairs}


def environment(root: Path) -> dict[str, str]:
    """This process's, in which `python -m` finds what lies at `root` from every folder."""
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}
