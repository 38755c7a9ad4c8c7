"""Files on disk: whole or not there when written, and one clear line when they cannot be read."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from bilevel_fast.base.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to: a crash at any moment leaves the old one or the new one at `path`, never a part."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


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


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        UserError: It is missing, not JSON, or holds something else than an object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: wanted a JSON object, found {type(fields).__name__}")
    return fields


def open_safetensors(path: Path) -> safe_open:
    """Map a safetensors file. Opening checks the header against the length of the file, so truncation shows here.

    Raises:
        UserError: It is missing, cut short, or not a safetensors file.
    """
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
