"""A real pseudo-terminal of 80 columns, and what a user would see on it."""

import contextlib
import os
import pty
import re
import select
import signal
import termios
import time
from collections.abc import Callable, Iterator, Sequence

COLUMNS = 80


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """The side of the user and that of the program, as file descriptors."""
    user, program = pty.openpty()
    termios.tcsetwinsize(program, (24, COLUMNS))
    try:
        yield user, program
    finally:
        for side in (user, program):
            with contextlib.suppress(OSError):  # whoever has wrapped it in a file has closed it
                os.close(side)


def drawn(user: int, wait: float = 0.2) -> str:
    """What has been written since the last call, until nothing comes for `wait` seconds."""
    data = b""
    while select.select([user], [], [], wait)[0]:
        try:
            more = os.read(user, 65536)
        except OSError:  # the other side has gone
            break
        if not more:
            break
        data += more
    return data.decode()


def screen(text: str) -> list[str]:
    """The lines that are left on the terminal, the one with the cursor last; every one as long as it was written."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[\d*[A-Za-z]|.|\n", text, flags=re.DOTALL):
        if token == "\r":
            column = 0
        elif token == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif token.startswith("\x1b["):
            assert token[-1] in "AKm", f"the screen here does not know {token!r}"
            if token[-1] == "A":
                row = max(row - 1, 0)
            elif token[-1] == "K":
                lines[row] = lines[row][:column]
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + token + line[column + 1 :]
            column += 1
    return lines


def child(program: Sequence[str], typed: str, when: Callable[[str], bool], limit: float = 60.0) -> tuple[int, str]:
    """Run a program on a terminal of its own and type something into it.

    Args:
        program: Its words.
        typed: `\\x03` is Ctrl-C.
        when: Whether to type now, given what has been written so far.
        limit: Seconds.

    Returns:
        Its exit code, and all that it has written to the terminal.
    """
    pid, user = pty.fork()
    if pid == 0:
        termios.tcsetwinsize(0, (24, COLUMNS))
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts what runs in the background with SIGINT ignored
        os.execvp(program[0], list(program))
    text, end, waiting = "", time.monotonic() + limit, True
    while time.monotonic() < end:
        try:
            more = os.read(user, 65536) if select.select([user], [], [], 0.5)[0] else b""
        except OSError:  # it has ended
            break
        text += more.decode(errors="replace")
        if waiting and when(text):
            os.write(user, typed.encode())
            waiting = False
    os.close(user)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text
