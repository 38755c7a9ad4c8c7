"""Files on disk: whole or not there when written, and one clear line when they cannot be read.

What is written lies aside until it is whole, under a name that no other process has: `.NAME.MACHINE-PID-NUMBER.tmp`.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.limits import JSON_BYTES, LINE_BYTES, NESTING

_numbers = itertools.count()
_ASIDE = re.compile(r"\..+\.([0-9a-f]{12})-(\d+)-\d+\.(tmp|old)")
_LONGEST = 180  # bytes of a name that is kept in the name aside: the system takes 255


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to: a crash at any moment leaves the old one or the new one at `path`, never a part.

    Any number of processes may write the same file: each its own, and the last one stays. Should `path` be a link, it
    is the link that is replaced, not what it leads to.

    Raises:
        OSError: The system refused, a full disk say; it names `path`, and nothing is left aside.
    """
    try:
        file, aside = _open_aside(path)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is None or _ASIDE.fullmatch(Path(os.fsdecode(error.filename)).name):
            error.filename, error.filename2 = str(path), None
        raise


def _open_aside(path: Path) -> tuple[BinaryIO, Path]:
    """A new file: never one that was there, and never what a link leads to."""
    while True:
        aside = aside_of(path)
        with suppress(FileExistsError):
            number = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            return os.fdopen(number, "wb"), aside


def aside_of(path: Path, end: str = "tmp") -> Path:
    """A name beside `path` that nobody else has, and that `sweep` knows when this process has died.

    Args:
        end: `tmp` for what is not whole yet, `old` for what was replaced.
    """
    name = path.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}.{_machine()}-{os.getpid()}-{next(_numbers)}.{end}")


def sweep(folder: Path, end: str = "tmp") -> None:
    """Delete what processes of this machine that were killed have left aside in a folder.

    What a live process may still write stays, and so does what another machine wrote: whether that lives is not known.
    """
    for entry in list(os.scandir(folder)):
        match = _ASIDE.fullmatch(entry.name)
        if match and match[1] == _machine() and match[3] == end and not _lives(int(match[2])):
            with suppress(FileNotFoundError, NotADirectoryError):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.unlink(entry.path)


@cache
def _machine() -> str:
    """12 hex digits, the same for processes that can ask whether the other lives: not for those of two containers."""
    known = [os.uname().nodename]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/pid")):
        with suppress(OSError):
            known.append(read())
    return hashlib.sha256("\0".join(known).encode()).hexdigest()[:12]


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, as `replacing`."""
    with replacing(path) as file:
        file.write(data)


def sync_folder(path: Path) -> None:
    """Make the names in a folder as durable as the files: a rename lives in the folder, not in the file."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Write one JSON object, indented, whole or not at all."""
    write_atomic(path, (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode())


def read_file(path: Path, most: int = JSON_BYTES) -> bytes:
    """All of a file, and never more than `most` bytes.

    Raises:
        UserError: It is missing, no regular file (a pipe would be waited for), or larger.
        OSError: It may not be read.
    """
    _check_regular(path)
    with path.open("rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise UserError(f"{path} has {size} bytes, wanted at most {most}")
        return file.read(most)


def _check_regular(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path} is {'no regular file' if os.path.lexists(path) else 'missing'}")


def parse_json(data: bytes | str, where: str, surrogates: bool = False) -> Any:
    """A JSON value from outside.

    Args:
        data: UTF-8.
        where: Names it in messages.
        surrogates: Leave text that is no Unicode, which "\\ud800" makes: the caller looks at each text.

    Raises:
        UserError: It is not JSON, is nested more than `NESTING` deep, or has text that is no Unicode.
    """
    try:
        value = json.loads(data.decode() if isinstance(data, bytes) else data)
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply, wanted at most {NESTING} brackets within each other") from error
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    inner = [value] if isinstance(value, dict | list) else []
    for _ in range(NESTING):
        if not inner:
            break
        values = (each for held in inner for each in (held.values() if isinstance(held, dict) else held))
        inner = [each for each in values if isinstance(each, dict | list)]
    if inner:
        raise UserError(f"{where} is nested too deeply, wanted at most {NESTING} brackets within each other")
    if not surrogates and (isinstance(data, str) or b"\\u" in data):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            text = error.object[error.start : error.end]
            raise UserError(f"{where} has text that is no Unicode: {text!r}") from error
    return value


def read_json(path: Path, surrogates: bool = False) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        UserError: It is missing, too large, not JSON (see `parse_json`), or holds something else than an object.
    """
    fields = parse_json(read_file(path), str(path), surrogates)
    if not isinstance(fields, dict):
        raise UserError(f"{path}: wanted a JSON object, found {type(fields).__name__}")
    return fields


def read_json_lines(path: Path, surrogates: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number, from 1, and object of each line that is not empty; one line is held at a time.

    A line ends at a line feed alone: JSON texts may hold U+2028 and its like, at which `splitlines` splits.

    Raises:
        UserError: As `read_json`, of the line; it is named.
    """
    _check_regular(path)
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(LINE_BYTES + 1)
            if not line:
                return
            if len(line) > LINE_BYTES:
                raise UserError(f"{path} line {number} has more than {LINE_BYTES} bytes")
            if line.strip():
                fields = parse_json(line, f"{path} line {number}", surrogates)
                if not isinstance(fields, dict):
                    raise UserError(f"{path} line {number}: wanted a JSON object, found {type(fields).__name__}")
                yield number, fields


def whole(value: Any, where: str, least: int, most: int) -> int:
    """A whole number that a file brought.

    Raises:
        UserError: It is something else, or out of range; `where` says what it is.
    """
    good = type(value) is int or (type(value) is float and value.is_integer())
    if not good or not least <= value <= most:
        raise UserError(f"{where} is {clip(value)}, wanted a whole number from {least} to {most}")
    return int(value)


def is_name(text: Any) -> bool:
    """Whether it can be the name of a file in a folder, and of none outside it."""
    good = type(text) is str and text not in ("", ".", "..") and not set(text) & {"/", "\\", "\0"}
    return good and not any("\ud800" <= c <= "\udfff" for c in text) and len(os.fsencode(text)) <= 255


def clip(value: Any, length: int = 80) -> str:
    """A value from a file, as a message shows it."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def open_safetensors(path: Path) -> safe_open:
    """Map a safetensors file. Opening checks the header against the length of the file, so truncation shows here.

    Raises:
        UserError: It is missing, cut short, or not a safetensors file.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is no regular file")  # a pipe would be waited for
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        if path.exists():  # it says the same of a file that may not be read
            raise UserError(f"{path} cannot be read: {_why(path)}") from error
        raise UserError(f"{path} is missing") from error
    except SafetensorError as error:
        raise UserError(f"{path} is cut short or not a safetensors file: {error}") from error


def _why(path: Path) -> str:
    try:
        path.open("rb").close()
    except OSError as error:
        return str(error.strerror)
    return "the reader of safetensors does not find it"


def sha256(path: Path) -> str:
    """The SHA-256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
