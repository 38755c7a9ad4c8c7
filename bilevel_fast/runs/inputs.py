"""What a run reads from outside its folder, known by what is in it and not by where it lies.

A teacher whose weights were changed in place is another teacher; the same folder under another name, as an absolute
path or after a move, is the same one.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json, sha256
from bilevel_fast.data.cache import FORMAT as CACHE
from bilevel_fast.data.stream import FORMAT as IMAGES
from bilevel_fast.models.hub import local
from bilevel_fast.models.weights import DIGEST, fingerprint
from bilevel_fast.runs import history

Settings = TypeVar("Settings")

_PARTS = ("unet", "text_encoder", "text_encoder_2", "vae", "scheduler")


def inputs(settings: Any, defaults: Mapping[str, Path], but: Collection[str] = ("out",)) -> dict[str, list[str]]:
    """A fingerprint of each file or folder that settings name, by the dotted name of the field.

    Args:
        settings: A dataclass, or several as a mapping; fields may be dataclasses themselves.
        defaults: What is read where a field is None.
        but: Fields that name no input.
    """
    named: dict[str, list[Path]] = {}
    for name, value in _fields(settings):
        value = defaults.get(name) if value is None else value
        paths = [path for path in (value if isinstance(value, tuple | list) else [value]) if isinstance(path, Path)]
        if paths and name not in but:
            named[name] = paths
    found: dict[str, list[str]] = {}
    for name, paths in named.items():
        if all(path.exists() for path in paths):  # who reads it says that one is missing
            found[name] = [_unet(path) if name.rpartition(".")[2] == "student" else content(path) for path in paths]
    return found


def fetched(settings: Settings, *fields: str) -> Settings:
    """Settings with the folders on this machine that ids on the hub stand for: what a run reads stays the same.

    Args:
        settings: A dataclass.
        fields: Those that name model folders; None stays.

    Raises:
        UserError, OSError: As `hub.local`.
    """
    named = {name: getattr(settings, name) for name in fields}
    found = {name: local(path) for name, path in named.items() if path is not None}
    return dataclasses.replace(settings, **found) if found else settings  # pyright: ignore[reportArgumentType]


def check_unchanged(before: Mapping[str, list[str]], now: Mapping[str, list[str]]) -> None:
    """Refuse what was changed while it was read: a run would be of both.

    Raises:
        UserError: Names the flag.
    """
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} names something that was changed while it was read; call again")


def content(path: Path) -> str:
    """A fingerprint of a file, a model folder, a cache, a bank, a list of images, a finished run, or any other folder.

    Of caches and lists it is that of their index, which has the checksums of all else.
    """
    if path.is_file():
        return sha256(path)[:DIGEST]
    if (path / "model_index.json").is_file():
        parts = [fingerprint(path / name) for name in _PARTS if (path / name).is_dir()]
        return _digest([*parts, *_files(path / "tokenizer"), *_files(path / "tokenizer_2")])
    if (path / "index.json").is_file():
        index = read_json(path / "index.json")
        if index.get("format") in (CACHE, IMAGES):
            return _digest({name: value for name, value in index.items() if name != "root"})
    if (path / "student" / "unet").is_dir() and (path / history.RECORD).is_file():
        past = history.read(path)
        banks = [(each.name, each.weight, content(Path(each.bank))) for each in past.concepts]
        return _digest([_unet(path / "student"), past.teacher, banks])
    return _digest(list(_files(path)))


def _unet(path: Path) -> str:
    """Of a student nothing else is read."""
    return fingerprint(path / "unet")


def _fields(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    pairs: Iterable[tuple[str, Any]]
    if isinstance(settings, Mapping):
        pairs = settings.items()
    else:
        pairs = ((field.name, getattr(settings, field.name)) for field in dataclasses.fields(settings))
    for name, value in pairs:
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _files(folder: Path) -> Iterator[list[str]]:
    if folder.is_dir():
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                yield [str(path.relative_to(folder)), sha256(path)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGEST]
