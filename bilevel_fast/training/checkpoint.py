"""Checkpoints that outlive a kill, a full disk and a flipped bit; the flag that ends a run after its step.

    <folder>/step-000123/model.safetensors       tensors by name
                         optimizer.safetensors   the tensors of {name: state dict}
                         optimizer.json          and the rest of it, see `trees`
                         state.json              counters, seeds, whatever JSON holds exactly
                         manifest.json           format, step, size and SHA-256 of the others

Files are hashed while they are written, tensor by tensor: saving takes no memory worth mentioning. Checkpoints of
format 1, which had it all in one `optimizer.pt`, are read as well.

A checkpoint is written as `.tmp-step-000123`, synced to the disk and renamed, so a folder named `step-*` is
whole unless something damaged it later. Nothing is replaced in place: a step that is saved again becomes
`step-000123.1`.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any, BinaryIO, Self, TypeVar

from safetensors import SafetensorError
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import clip, parse_json, read_file, sha256, sync_folder
from bilevel_fast.base.pickles import load_plain
from bilevel_fast.base.tensors import read_tensors, write_tensors
from bilevel_fast.scale.team import Team
from bilevel_fast.training.trees import pack, unpack

FORMAT = 2

_MODEL, _STATE, _MANIFEST = "model.safetensors", "state.json", "manifest.json"
_MOMENTS, _PLAIN, _PICKLED = "optimizer.safetensors", "optimizer.json", "optimizer.pt"
_FILES = {1: (_MODEL, _PICKLED, _STATE), 2: (_MODEL, _MOMENTS, _PLAIN, _STATE)}
_NAME = re.compile(r"step-(\d{6,})(?:\.(\d+))?")
_ASIDE = ".tmp-"

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Checkpoint:
    """What `save` was given, bit for bit. Every tensor is on the CPU, contiguous, and still in its file: take what is
    wanted, and let go of it."""

    step: int
    tensors: dict[str, Tensor]
    optimizers: dict[str, dict[str, Any]]
    state: dict[str, Any]
    path: Path


class _DamagedError(Exception):
    """A file of a checkpoint is not what was saved: `<file>: <what is wrong>`."""


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    optimizers: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Any],
) -> Path:
    """Write a checkpoint and keep the one before it; everything else in `folder` goes.

    Those of this step or later ones go too: a run that is at `step` could not read them, or it would be
    there.

    Args:
        folder: The run's folder of checkpoints; made if missing. One process writes to it at a time.
        tensors: By name, on any device and in any memory format. Nobody changes them meanwhile.
        optimizers: By name, what `Optimizer.state_dict` returns: tensors and plain values. As `tensors`.
        state: JSON values; tuples come back as lists.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UserError: the system refused to write (a full disk); the earlier checkpoints are as they were.
    """
    attempts = [attempt for found, attempt, _ in _checkpoints(folder) if found == step]
    name = f"step-{step:06d}" + (f".{attempts[-1] + 1}" if attempts else "")
    aside = folder / f"{_ASIDE}{name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{_ASIDE}*"):
            shutil.rmtree(leftover)
        aside.mkdir()
        _write(aside, step, tensors, optimizers, state)
        path = aside.rename(folder / name)
        sync_folder(folder)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"checkpoint {step} not saved in {folder}: {reason}; earlier ones are untouched") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _prune(folder, step, path)
    return path


def tidy(folder: Path, step: int) -> None:
    """Delete what a process that was killed after it had saved `step` had no time to delete; for who writes there.

    A run that is done saves nothing more, and checkpoints have gigabytes. Nothing goes that may be damaged: who has
    read `step` has not read what is newer.
    """
    for leftover in folder.glob(f"{_ASIDE}*"):
        shutil.rmtree(leftover)
    found = _checkpoints(folder)
    if [number for number, _, _ in found[-2:]].count(step) == 1 and found[-1][0] == step:
        _prune(folder, step, found[-1][2])


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, None if there is none; a damaged one on the way gets a warning.

    Raises:
        UserError: there are checkpoints and all are damaged, or the newest is of another format. Starting over, or
            going back, is for the user to decide.
    """
    found = _checkpoints(folder)
    for step, _, path in reversed(found):
        try:
            return _load(path, step)
        except _DamagedError as damage:
            _log.warning("checkpoint %s is damaged, trying the one before it: %s", path, damage)
    if found:
        raise UserError(
            f"all {len(found)} checkpoints in {folder} are damaged; restore one, or start with another --out"
        )
    return None


def latest_of_all(folder: Path, team: Team) -> Checkpoint | None:
    """`latest` for all ranks of a team: the first one verifies, the others read what it found, from the same storage.

    Raises:
        UserError: As `latest`; or a rank cannot read it.
    """
    if team.world == 1:
        return latest(folder)
    if team.rank == 0:
        found = latest(folder)
        team.first(lambda: None if found is None else [found.path.name, found.step])
        return found
    named: Any = team.first(lambda: None)
    if named is None:
        return None
    name, step = named
    try:
        return _load(folder / name, step, verify=False)
    except _DamagedError as damage:
        raise UserError(f"checkpoint {folder / name} is not what rank 0 found there: {damage}") from damage


class GracefulStop:
    """While entered, SIGTERM and SIGINT only set `requested`; a second SIGINT raises KeyboardInterrupt.

        with GracefulStop() as stop:
            while step < steps and not stop.requested:
                ...

    Signal handlers belong to the main thread, so enter it there.

    Args:
        ends: An error ends this process, which says why first: SIGTERM does not end it from then on. A launcher sends
            it to all that are left when one is gone, and they are who can say which.
    """

    def __init__(self, ends: bool = False) -> None:
        self.ends, self.requested = ends, False
        self._interrupted = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            if self.ends and kind is not None and number == signal.SIGTERM:
                continue
            # None stands for a handler that Python did not install and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT
        self.requested = True


def _checkpoints(folder: Path) -> list[tuple[int, int, Path]]:
    """(step, attempt, path) of all `step-*` folders, oldest first."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return sorted((int(match[1]), int(match[2] or 0), path) for match, path in named if match)


def _write(
    aside: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    optimizers: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Any],
) -> None:
    plain, moments = pack(dict(optimizers))
    files = {
        _MODEL: _written(aside / _MODEL, lambda file: write_tensors(file, tensors)),
        _MOMENTS: _written(aside / _MOMENTS, lambda file: write_tensors(file, moments)),
        _PLAIN: _written(aside / _PLAIN, lambda file: file.write(json.dumps(plain).encode())),
        _STATE: _written(aside / _STATE, lambda file: file.write(_strict(dict(state)))),
    }
    _written(aside / _MANIFEST, lambda file: file.write(_strict({"format": FORMAT, "step": step, "files": files})))
    sync_folder(aside)


def _strict(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, indent=1).encode()


class _Hashing:
    """Hands bytes on to a file, and knows their number and their SHA-256: nobody has to read them again."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: Any, /) -> None:
        self.size += self.file.write(data)
        self.digest.update(data)


def _written(path: Path, write: Callable[[_Hashing], object]) -> dict[str, Any]:
    """Write a file down to the disk; what the manifest says about it."""
    with path.open("wb") as file:
        write(hashing := _Hashing(file))
        file.flush()
        os.fsync(file.fileno())
    return {"size": hashing.size, "sha256": hashing.digest.hexdigest()}


def _prune(folder: Path, step: int, newest: Path) -> None:
    earlier = [path for found, _, path in _checkpoints(folder) if found < step and _is_complete(path, found)]
    for _, _, path in _checkpoints(folder):
        if path not in (newest, *earlier[-1:]):
            # Renamed first: a kill half-way leaves a leftover, and never half a checkpoint.
            shutil.rmtree(path.rename(folder / f"{_ASIDE}{path.name}"))


def _is_complete(path: Path, step: int) -> bool:
    """Whether all files are there with their sizes: what can be told without reading gigabytes."""
    try:
        _check_sizes(path, step)
    except (_DamagedError, UserError):
        return False
    return True


def _load(path: Path, step: int, verify: bool = True) -> Checkpoint:
    for name, digest in _check_sizes(path, step).items():
        if verify and _read(path / name, sha256) != digest:
            raise _DamagedError(f"{name}: its SHA-256 is not the manifest's")
    optimizers = _pickled(path) if (path / _PICKLED).exists() else _optimizers(path)
    state = _read(path / _STATE, _load_json)
    if not isinstance(state, dict) or not isinstance(optimizers, dict):
        raise _DamagedError(f"{_STATE}, or the optimizers: not an object")
    return Checkpoint(step, _read(path / _MODEL, read_tensors), optimizers, state, path)


def _optimizers(path: Path) -> dict[str, dict[str, Any]]:
    moments = _read(path / _MOMENTS, read_tensors)
    return _read(path / _PLAIN, lambda file: unpack(_load_json(file), moments))


def _pickled(path: Path) -> dict[str, dict[str, Any]]:
    """Of format 1."""
    return _read(path / _PICKLED, lambda file: load_plain(file, mmap=True))


def _check_sizes(path: Path, step: int) -> dict[str, str]:
    """Compare the sizes with the manifest, which must be of this step; return SHA-256 by file.

    Raises:
        UserError: the checkpoint is of another format.
    """
    manifest = _read(path / _MANIFEST, _load_json)
    try:
        if (number := manifest["format"]) not in _FILES:
            raise UserError(f"checkpoint {path} has format {clip(number)}, this release reads 1 to {FORMAT}")
        wanted = {name: manifest["files"][name] for name in _FILES[number]}
        files = {name: (int(fields["size"]), str(fields["sha256"])) for name, fields in wanted.items()}
        found = manifest["step"]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise _DamagedError(f"{_MANIFEST}: not a manifest") from error
    if found != step:
        raise _DamagedError(f"{_MANIFEST}: its step is {found}, wanted {step}")
    for name, (size, _) in files.items():
        actual = _read(path / name, lambda file: file.stat().st_size)
        if actual != size:
            raise _DamagedError(f"{name}: {actual} bytes, wanted {size}")
    return {name: digest for name, (_, digest) in files.items()}


def _read(path: Path, parse: Callable[[Path], _T]) -> _T:
    try:
        return parse(path)
    except UnpicklingError as error:
        raise _DamagedError(f"{path.name}: holds more than tensors and plain values, so it is not loaded") from error
    except OSError as error:
        raise _DamagedError(f"{path.name}: {error.strerror}") from error
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
        raise _DamagedError(f"{path.name}: {str(error).partition(chr(10))[0]}") from error


def _load_json(path: Path) -> Any:
    return parse_json(read_file(path), path.name, surrogates=True)
