"""Weight files of a model folder: finding them, reading them, and saying exactly what does not fit."""

import difflib
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import clip, is_name, open_safetensors, read_json, sha256, whole
from bilevel_fast.base.limits import LEVELS
from bilevel_fast.base.tensors import read_tensors

PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
DIGEST = 16  # hex digits of a fingerprint: enough to tell apart the models one person owns
STEMS = ("diffusion_pytorch_model", "model")
"""Of the files that hold weights: diffusers' and transformers'."""
_SHOWN = 3


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of one component; together they hold its weights."""

    variant: str | None
    """What diffusers and transformers call it when they are to load the same files."""
    files: tuple[Path, ...]


def find_weights(folder: Path, stem: str) -> WeightFiles:
    """Find `stem.safetensors`, its shards, or its half-precision variant, in this order, and open each file.

    Raises:
        UserError: There are none, only pickles, or one is missing, cut short or not a safetensors file.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    half = folder / f"{stem}.fp16.safetensors"
    if single.is_file():
        found = WeightFiles(None, (single,))
    elif index.is_file():
        found = WeightFiles(None, _shards(index))
    elif half.is_file():
        found = WeightFiles("fp16", (half,))
    elif pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise UserError(f"{folder} has only {pickles[0]}: pickle weights are not loaded; convert to safetensors")
    else:
        raise UserError(f"{single} is missing")
    for file in found.files:
        open_safetensors(file)
    return found


def _shards(index: Path) -> tuple[Path, ...]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: weight_map is missing")
    for name in names.values():
        if not is_name(name):
            raise UserError(f"{index}: {clip(name)} is not the name of a file beside it")
    return tuple(index.with_name(name) for name in sorted(set(names.values())))


def read_weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of a component, as fp32 on the CPU whatever they are stored in.

    Raises:
        UserError: As `mapped_weights`.
    """
    # Copied: a tensor that is still mapped would change, or crash the process, with its file.
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in mapped_weights(folder, stem).items()}


def mapped_weights(folder: Path, stem: str) -> dict[str, Tensor]:
    """All tensors of a component, as and where they lie in its files: see `read_tensors`.

    Raises:
        UserError: As `find_weights`; or a tensor is empty, or not finite.
    """
    weights: dict[str, Tensor] = {}
    for file in find_weights(folder, stem).files:
        found = read_tensors(file)
        for name, tensor in found.items():
            _check_numbers(file, name, tensor)
        weights |= found
    return weights


def _check_numbers(file: Path, name: str, tensor: Tensor) -> None:
    """One that is not finite makes everything so that is computed with it."""
    if not tensor.numel():
        raise UserError(f"{file}: {name} is empty: its shape is {list(tensor.shape)}")
    if tensor.is_floating_point():
        wide = tensor if tensor.dtype.itemsize > 1 else tensor.float()
        least, most = wide.aminmax()  # NaN is both, where there is one; a mask of finite ones would be as large again
        if not bool(least.isfinite() & most.isfinite()):
            raise UserError(f"{file}: {name} is not finite: its numbers go from {least.item()} to {most.item()}")


def check_names(what: str, found: Collection[str], wanted: Collection[str]) -> None:
    """Refuse weights whose names are not the wanted ones.

    Raises:
        UserError: Names are missing or unexpected; says how many and which first.
    """
    found, wanted = set(found), set(wanted)
    missing, unexpected = sorted(wanted - found), sorted(found - wanted)
    parts = [f"{_count(names)} {kind}" for names, kind in ((missing, "missing"), (unexpected, "unexpected")) if names]
    if not parts:
        return
    near = difflib.get_close_matches(missing[0], unexpected, n=1) if missing else []
    hint = f"; is {near[0]} meant to be {missing[0]}?" if near else ""
    raise UserError(f"{what}: {', '.join(parts)}{hint}")


def _count(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} weight{'s' if len(names) > 1 else ''} ({shown})"


def load_pretrained(cls: Any, folder: Path, **settings: Any) -> Any:
    """`cls.from_pretrained` of diffusers or transformers on a folder of this machine; the network is never asked.

    Raises:
        UserError: The library cannot make sense of the folder.
    """
    try:
        return cls.from_pretrained(folder, local_files_only=True, **settings)
    except Exception as error:  # a bad file makes these libraries raise anything
        raise UserError(f"{folder}: {' '.join(str(error).split())}") from error


def check_counts(folder: Path, config: Mapping[str, Any], most: Mapping[str, int]) -> None:
    """Refuse numbers of a config that nobody can build: the libraries that read it would try.

    Args:
        folder: Of the component, for the message.
        config: Its config.json.
        most: The largest value of each field that is looked at; each may be a list of such, of at most `LEVELS`.

    Raises:
        UserError: One is no whole number, below 1 or above that.
    """
    for field, limit in most.items():
        value, where = config.get(field), f"{folder / 'config.json'}: {field}"
        if isinstance(value, list) and len(value) > LEVELS:
            raise UserError(f"{where} has {len(value)} entries, wanted at most {LEVELS}")
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            whole(number, where, 1, limit)


def check_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Refuse what diffusers and transformers only warn about: weights that were not in the file are random now.

    Args:
        folder: Of the component, for the message.
        report: The loading info that `from_pretrained(..., output_loading_info=True)` returns.

    Raises:
        UserError: A weight is missing, unexpected, or has another shape than the config says.
    """
    check_names(str(folder), report["unexpected_keys"], report["missing_keys"])
    if report["mismatched_keys"]:
        name, came, wanted = min(report["mismatched_keys"])
        raise UserError(f"{folder}: {name} has shape {list(came)}, the config wants {list(wanted)}")


_WITH_COPIES: dict[str, Path] = {}
"""Folders that hold weights beside those that are read, by their fingerprints."""


def fingerprint(folder: Path) -> str:
    """A short id of a component: its configuration and the weights that are read, wherever the folder lies.

    Notes that tools leave in a configuration (names with a leading underscore, such as the version that wrote it) do
    not count, and neither do weights in another precision beside those that are read.
    """
    unread = _unread(folder)
    found = _digest(folder, unread)
    if unread:
        _WITH_COPIES[found] = folder
    return found


def same_component(one: Any, other: Any) -> bool:
    """Whether two fingerprints are of the same component. Those of the past counted all weights in its folder.

    Other values are the same if they are equal.
    """
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return one == other
    pairs = ((one, other), (other, one))
    return any(new in _WITH_COPIES and _digest(_WITH_COPIES[new], ()) == old for new, old in pairs)


def _digest(folder: Path, unread: Collection[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")):
        if path.name in unread:
            continue
        digest.update(path.name.encode() + b"\0")
        if path.suffix == ".json":
            fields = {key: value for key, value in read_json(path).items() if not key.startswith("_")}
            digest.update(json.dumps(fields, sort_keys=True).encode())
        else:
            state = path.stat()
            digest.update(bytes.fromhex(_sum(path, (state.st_size, state.st_mtime_ns, state.st_ino))))
    return digest.hexdigest()[:DIGEST]


@lru_cache(maxsize=256)
def _sum(path: Path, state: tuple[int, ...]) -> str:
    """Of a file in this state: gigabytes are read once in a process."""
    return sha256(path)


def _unread(folder: Path) -> set[str]:
    """Weights that lie beside those that are read, and lists of such."""
    names = {path.name for path in folder.iterdir()}
    unread = {name for name in names if name.endswith(".bin.index.json")}
    for stem in STEMS:
        files = {name for name in names if name.startswith((f"{stem}.", f"{stem}-"))}
        files = {name for name in files if name.endswith((".safetensors", ".index.json"))}
        if read := _read_names(folder, stem):
            unread |= files - read
    return unread


def _read_names(folder: Path, stem: str) -> set[str]:
    """The files that `find_weights` opens, and the list of them where there is one; none if it would refuse."""
    single, index, half = (f"{stem}.{end}" for end in ("safetensors", "safetensors.index.json", "fp16.safetensors"))
    if (folder / single).is_file():
        return {single}
    if (folder / index).is_file():
        return {index, *(path.name for path in _shards(folder / index))}
    return {half} if (folder / half).is_file() else set()
