"""One process to an output: locks that end with their process, and the place of something new."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import short

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of file systems that have none, as some clusters' do


@contextmanager
def locked(path: Path, what: str) -> Iterator[bool]:
    """Hold a lock file, which is gone afterwards; yields whether it was there, left by a process that was killed.

    The lock is the kernel's (flock): it goes with the process. Where a file system has none, nothing is locked.

    Args:
        path: Of the lock file; its folder is there.
        what: That is written, for the message.

    Raises:
        UserError: Another process holds it.
        OSError: The folder cannot be written to.
    """
    number = _take(path, what)
    try:
        left = os.fstat(number).st_size > 0
        os.ftruncate(number, 0)
        os.write(number, f"{os.getpid()} on {os.uname().nodename}".encode())
        yield left
    finally:
        path.unlink(
            missing_ok=True
        )  # held: who waits for nothing finds another file, and who has opened this one looks
        os.close(number)


def _take(path: Path, what: str) -> int:
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return number
            holder = os.read(number, 200).decode(errors="replace").strip() or "unknown"
            os.close(number)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise UserError(f"{what} is in use by process {holder}; wait for it or choose another place") from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(number), os.stat(path)):
                return number
        os.close(number)  # its holder was done and deleted it after it was opened here


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """The place of a new file or folder, from before the work for it until it is there.

    That the place cannot be written to, or that another process works for it, is said before the work and not behind
    it. The folders above are made; those that stay empty go again. Yields whether a process that had claimed the same
    place was killed: what it would not have found there it made.

    Raises:
        UserError: There is something, another process holds the place, or what is to be a folder is a file.
        OSError: The folder cannot be written to.
    """
    with made(path.parent), locked(path.with_name(f".{short(path)}.lock"), str(path)) as left:
        if os.path.lexists(path):
            raise UserError(f"{path} exists already; delete it or choose another name")
        yield left


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """A folder and those above it, made where they are missing; those that stay empty go again.

    Raises:
        UserError: What is to be a folder is a file.
        OSError: It cannot be made.
    """
    missing = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    above = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if not above.is_dir():
        raise UserError(f"{folder}: {above} is a file, wanted a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for each in missing:
            with suppress(OSError):
                each.rmdir()
