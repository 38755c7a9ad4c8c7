"""The run folder: one run, one live process, and the configuration that it was started with.

config.json  inputs.json  sessions.jsonl  stats.jsonl  summary.json  report.html  checkpoints/  student/  samples/
events/
"""

import errno
import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json, sweep, write_atomic

_CONFIG, _INPUTS, _LOCK = "config.json", "inputs.json", ".lock"
_ABSENT = object()
_SHOWN_DIFFERENCES = 3


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of a run lie. `RunFolder(path)` reads any run; only `open` gives the right to write."""

    path: Path

    @classmethod
    @contextmanager
    def open(
        cls,
        path: Path,
        config: Mapping[str, Any],
        *,
        resume: bool,
        volatile: Collection[str] = (),
        inputs: Mapping[str, Any] | None = None,
        unset: Mapping[str, Any] | None = None,
    ) -> Iterator[Self]:
        """Start a run in `path`, or go on with the one that is there, and hold its lock meanwhile.

        The lock is the kernel's (flock): it goes with the process, even one that was killed.

        Args:
            config: The resolved configuration, of JSON values; kept as config.json.
            resume: Go on with the run in `path` instead of starting one.
            volatile: Dotted keys, or sections, that may differ between the runs, such as where to print.
            inputs: Fingerprints of what dotted keys name, of JSON values; kept as inputs.json. These are compared
                instead of the names, which may differ. A run of before there were any goes by the names.
            unset: The configuration where nobody sets anything: what a run had of settings that are newer than it.

        Raises:
            UserError: another process holds the folder; it holds a run and `resume` is off; there is no run
                to resume, or one with another configuration or other inputs. The run has not been changed then.
        """
        run = cls(path)
        run.check(resume)  # before the lock: a folder of somebody else's does not even get that file
        if not resume:
            _make(path)
        with _locked(path):
            sweep(path)
            if resume:
                known = _check_inputs(path, config, inputs or {})
                _check_same(run.config, config, (*volatile, *known), unset or {})
            else:
                _refuse_content(path)
            run.write_json(_CONFIG, config)
            if inputs is not None:
                run.write_json(_INPUTS, inputs)
            yield run

    def check(self, resume: bool) -> None:
        """Look whether a run can begin, or go on, here, and write nothing: better before the work than after it.

        Raises:
            UserError: There is no run to resume; or without `resume` something lies here. Who holds it, `open` says.
        """
        if resume and not self.config.is_file():
            raise UserError(f"there is no run to resume in {self.path}: {self.config} does not exist")
        if not resume and self.path.is_dir() and not _is_held(self.path / _LOCK):
            _refuse_content(self.path)

    @property
    def config(self) -> Path:
        return self.path / _CONFIG

    @property
    def stats(self) -> Path:
        return self.path / "stats.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def student(self) -> Path:
        return self.path / "student"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def events(self) -> Path:
        return self.path / "events"

    def write_json(self, name: str, value: Any) -> Path:
        """Write strict JSON (no NaN) atomically; `name` is relative to the run folder."""
        return self.write_text(name, json.dumps(value, allow_nan=False, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Write UTF-8 text atomically; `name` is relative to the run folder."""
        return self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Write a file atomically; `name` is relative to the run folder, and its folders are made."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
        return path


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"lower": {"lr": 1}}` becomes `{"lower.lr": 1}`; lists and empty sections are values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{path} cannot be a run folder: {error.filename} is a file") from error


def _refuse_content(path: Path) -> None:
    """Raise if anything is there; dot files do not count: they are the lock and what a killed write left."""
    if any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise UserError(f"run folder {path} already holds a run; pass --resume to continue it or choose another --out")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # Append mode: opening must not wipe the holder's name. The file is never deleted: a process that has
    # opened the deleted one and a process that makes a new one would both get their lock.
    if (path / _LOCK).is_symlink():
        raise UserError(f"{path / _LOCK} is a link, and would be written through; delete it")
    number = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with os.fdopen(number, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UserError(f"run folder {path} is in use by process {holder}; choose another --out") from error
        file.truncate(0)
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def _is_held(lock: Path) -> bool:
    """Whether a live process has this lock."""
    if not lock.is_file() or lock.is_symlink():
        return lock.is_symlink()
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _check_inputs(path: Path, config: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    """The keys whose names need not be compared, after their fingerprints were."""
    if not (path / _INPUTS).is_file():
        return []
    old, names = read_json(path / _INPUTS), flatten(config)
    for key in sorted(old.keys() & inputs.keys()):
        if old[key] != inputs[key]:
            where = names[key] if names.get(key) else "the built-in one"
            raise UserError(
                f"run folder {path} was begun with another {key}: its fingerprint was {_listed(old[key])}, that of "
                f"{_listed(where)} is {_listed(inputs[key])}"
            )
    return sorted(old.keys() & inputs.keys())


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _check_same(
    saved_path: Path, config: Mapping[str, Any], volatile: Collection[str], unset: Mapping[str, Any]
) -> None:
    old, new, usual = (flatten(json.loads(json.dumps(each))) for each in (read_json(saved_path), config, unset))
    differences = [
        f"{key} was {_shown(old, key)}, is {_shown(new, key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, usual.get(key, _ABSENT)) != new.get(key, _ABSENT)
        and not any(key == name or key.startswith(f"{name}.") for name in volatile)
    ]
    if differences:
        more = len(differences) - _SHOWN_DIFFERENCES
        shown = "; ".join(differences[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
        raise UserError(f"run folder {saved_path.parent} holds a run with other settings: {shown}")


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return json.dumps(flat[key]) if key in flat else "absent"
