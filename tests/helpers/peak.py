"""The memory that a piece of code takes at its peak, seen from outside: `RssAnon` of a process of its own.

That is what the process has allocated and touched. Pages of mapped files do not count: the system takes them back when
it wants memory.
"""

import os
import subprocess
import sys
import time
from pathlib import Path


def peak_bytes(setup: str, code: str) -> int:
    """Bytes that `code` takes at its peak beyond what `setup`, usually imports, has left; run one after the other.

    Raises:
        AssertionError: The process failed; with what it wrote to stderr.
    """
    wait = "\nprint('ready', flush=True)\ninput()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", setup + wait + code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    assert process.stderr
    if process.stdout.readline() != "ready\n":
        raise AssertionError(process.communicate()[1])
    first = peak = _anonymous(process.pid)
    process.stdin.write("\n")
    process.stdin.flush()
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        time.sleep(0.001)
    if process.returncode:
        raise AssertionError(process.communicate()[1])
    process.communicate()
    return peak - first


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
