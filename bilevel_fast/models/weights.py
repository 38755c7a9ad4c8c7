"""Weight files of a model folder: finding them, reading them, and saying exactly what does not fit."""

import difflib
import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import clip, is_name, open_safetensors, read_json, sha256, whole
from bilevel_fast.base.limits import LEVELS
from bilevel_fast.base.tensors import read_tensors

PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl")
DIGEST = 16  # hex digits of a fingerprint: enough to tell apart the models one person owns
STEMS = ("diffusion_pytorch_model", "model")
"""Of the files that hold weights: diffusers' and transformers'."""
_SHOWN = 3
_VARIANT = r"\.((?:(?!-\d+-of-\d)[^.])+)"
_SINGLE = rf"{{stem}}(?:{_VARIANT})?\.safetensors"
_INDEX = rf"{{stem}}\.safetensors(?:{_VARIANT})?\.index(?:{_VARIANT})?\.json"
"""Of diffusers before 0.32 (the first place), of diffusers since and of transformers (the second)."""


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of one component; together they hold its weights."""

    variant: str | None
    """What diffusers and transformers call it when they are to load the same files."""
    index: Path | None
    """Lists the files, if they are shards."""
    files: tuple[Path, ...]


def find_weights(folder: Path, stem: str) -> WeightFiles:
    """Find the weights of a component, and open each file.

    Read is what has no variant in its name: `stem.safetensors`, or else its shards by `stem.safetensors.index.json`.
    Without such, the variant `fp16` (`stem.fp16.safetensors`, `stem.safetensors.index.fp16.json`), or else the only
    variant that there is.

    Raises:
        UserError: There are none, several variants and none of these, only pickles, or one is missing, cut short or not
            a safetensors file.
    """
    found = _find(folder, stem)
    for file in found.files:
        open_safetensors(file)
    return found


def _find(folder: Path, stem: str) -> WeightFiles:
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    single, index = (_by_variant(stem, names, pattern) for pattern in (_SINGLE, _INDEX))
    wanted = _variant(folder, {*single, *index})
    if wanted is None:
        raise UserError(_why_none(folder, stem, names))
    if wanted in single:
        return WeightFiles(wanted or None, None, (folder / single[wanted],))
    shards = _shards(folder / index[wanted])
    return WeightFiles(wanted or None, folder / index[wanted], shards)


def _variant(folder: PurePath, variants: Collection[str]) -> str | None:
    if not variants:
        return None
    wanted = next((each for each in ("", "fp16") if each in variants), min(variants))
    if wanted not in ("", "fp16") and len(variants) > 1:
        listed = ", ".join(sorted(variants))
        raise UserError(f"{folder} has weights of the variants {listed} and none without a variant; leave one of them")
    return wanted


def weight_names(folder: PurePath, stem: str, names: Sequence[str]) -> list[str]:
    """Of the files that a component has somewhere else, those that `find_weights` would read: by their names alone.

    Args:
        folder: For messages.
        stem: As `find_weights`.
        names: Of the files.

    Returns:
        One file, or the list of the shards and all shards of its variant; nothing where there are no safetensors.

    Raises:
        UserError: There are several variants, and none that comes first.
    """
    single, index = (_by_variant(stem, names, pattern) for pattern in (_SINGLE, _INDEX))
    wanted = _variant(folder, {*single, *index})
    if wanted is None or wanted in single:
        return [] if wanted is None else [single[wanted]]
    shard = rf"{re.escape(stem)}(?:{_VARIANT})?-\d+-of-\d+(?:{_VARIANT})?\.safetensors"
    found = (re.fullmatch(shard, name) for name in names)
    return [index[wanted], *(match[0] for match in found if match and next(filter(None, match.groups()), "") == wanted)]


def _by_variant(stem: str, names: Sequence[str], pattern: str) -> dict[str, str]:
    """The files of one kind; "" is no variant."""
    found = (re.fullmatch(pattern.format(stem=re.escape(stem)), name) for name in names)
    return {next(filter(None, match.groups()), ""): match[0] for match in found if match}


def _why_none(folder: Path, stem: str, names: Sequence[str]) -> str:
    shards = [name for name in names if re.fullmatch(rf"{re.escape(stem)}.*-of-\d+.*\.safetensors", name)]
    if shards:
        return f"{folder} has the shard {shards[0]}, and {stem}.safetensors.index.json, which lists them, is missing"
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return f"{folder} has only {pickles[0]}: pickle weights are not loaded; convert to safetensors"
    return f"{folder / f'{stem}.safetensors'} is missing"


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
            found = path.stat()  # times go back with clocks, and are set back by programs: both, and only for equality
            state = found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
            digest.update(bytes.fromhex(_sum(path, state)))
    return digest.hexdigest()[:DIGEST]


@lru_cache(maxsize=256)
def _sum(path: Path, state: tuple[int, ...]) -> str:
    """Of a file in this state: gigabytes are read once in a process."""
    return sha256(path)


def _unread(folder: Path) -> set[str]:
    """Weights that lie beside those that are read, and lists of such."""
    names = sorted(path.name for path in folder.iterdir())
    unread = {name for name in names if name.endswith(".bin.index.json")}
    for stem in STEMS:
        files = {name for name in names if name.startswith((f"{stem}.", f"{stem}-")) and name.endswith(".safetensors")}
        files |= set(_by_variant(stem, names, _INDEX).values())
        try:
            found = _find(folder, stem)
        except UserError:  # then none is read
            continue
        unread |= files - {path.name for path in (*found.files, found.index) if path}
    return unread


def digest_of(module: nn.Module) -> str:
    """SHA-256 of names and values of a state dict, wherever it lies; one copy to the host."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
