"""What every edit of weights takes, what it returns, and the record of it in the model folder.

erased.json   {"format", "version", "edits": [...]}: every edit that the weights went through, the first one first
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json
from bilevel_fast.erasing.pairs import Frame, Pair
from bilevel_fast.models.architecture import Site, sites
from bilevel_fast.models.folder import ModelFolder
from bilevel_fast.models.structure import Structure

RECORD = "erased.json"
_FORMAT, _VERSION = "bilevel_fast.erased", 1


@dataclass(frozen=True)
class Record:
    """One edit: enough to say what was asked, and for a later edit to keep it."""

    method: str
    pairs: tuple[Pair, ...]
    frames: tuple[Frame, ...]
    preserve: tuple[str, ...]
    settings: Mapping[str, Any]
    """As they were used, defaults resolved."""
    skipped: tuple[str, ...]
    """Sites that the student has dropped."""


@dataclass(frozen=True, eq=False)
class Job:
    """What is asked of an edit.

    Attributes:
        folder: Of the model: text encoder, schedule, config. The UNet comes by itself.
        pairs: Checked by `pairs.check`.
        frames: Sentences for them.
        preserve: Texts that should stay what they are.
        earlier: The edits that the weights went through already.
        progress: Called with the prompts sampled and to sample, by edits that sample.
    """

    folder: ModelFolder
    pairs: tuple[Pair, ...]
    frames: tuple[Frame, ...] = ()
    preserve: tuple[str, ...] = ()
    earlier: tuple[Record, ...] = ()
    progress: Callable[[int, int], None] | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What an edit did.

    Attributes:
        record: For the model folder.
        table: For each kind of layer, the numbers by column.
        notes: Whatever else the user should know, a line each.
        tensors: Files of tensors for the model folder, by file name: what a later edit wants to know.
    """

    record: Record
    table: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...] = ()
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def transformers(structure: Structure) -> tuple[tuple[Site, ...], tuple[str, ...]]:
    """The sites of a UNet that still have a transformer block, one each, and the names of those it has dropped.

    Of a Transformer with several blocks each is a site; where that is dropped as a whole, it alone is named.

    Raises:
        UserError: It has none left.
    """
    members, gone = [site for site in sites(structure.config) if site.kind != "resnet"], structure.dropped
    left = tuple(site for site in members if site.transformer_block and not {site.name, site.within} & gone)
    if not left:
        count = sum(site.kind == "transformer" for site in members)
        raise UserError(f"all {count} Transformers of the model were dropped; there is nothing to edit")
    return left, tuple(site.name for site in members if site.name in gone and site.within not in gone)


def to_json(records: Sequence[Record]) -> dict[str, Any]:
    """The content of `erased.json`."""
    return {"format": _FORMAT, "version": _VERSION, "edits": [asdict(record) for record in records]}


def read_records(folder: Path) -> tuple[Record, ...]:
    """The edits that a model folder records; none if it has no `erased.json`.

    Raises:
        UserError: The file is broken, or of a newer version.
    """
    path = folder / RECORD
    if not path.exists():
        return ()
    fields = read_json(path)
    if fields.get("format") != _FORMAT or fields.get("version") != _VERSION:
        found = f"{fields.get('format')!r}, version {fields.get('version')!r}"
        raise UserError(f"{path} is {found}; this release reads {_FORMAT!r}, version {_VERSION}")
    try:
        return tuple(
            Record(
                edit["method"],
                tuple(Pair(**pair) for pair in edit["pairs"]),
                tuple(Frame(**frame) for frame in edit["frames"]),
                tuple(edit["preserve"]),
                dict(edit["settings"]),
                tuple(edit["skipped"]),
            )
            for edit in fields["edits"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not hold what a record of edits holds ({error})") from error
