"""What a run erases and what the run that it goes on from erased before: `concepts.json`, and the student of that run.

concepts.json   {"format", "version", "teacher": fingerprint of its unet/,
                 "concepts": [{"name", "bank", "weight"}, ...]}: the first one erased first

A bank within a run's folder is recorded relative to it, so that the folder may move; any other by its absolute path.
"""

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json
from bilevel_fast.data.blend import Blend
from bilevel_fast.data.cache import Cache
from bilevel_fast.data.sources import LatentSource
from bilevel_fast.erasing.phrases import clashes_of, held, pairs_of, phrases, plain
from bilevel_fast.models.weights import same_component

RECORD = "concepts.json"
_FORMAT, _VERSION = "bilevel_fast.concepts", 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Erased:
    """One concept of a run."""

    name: str
    """A style of the mini world, or the folder of a bank."""
    bank: str
    """Where the bank lies."""
    weight: float = 1.0
    """Its share of the upper batches, among the others'."""


@dataclass(frozen=True)
class History:
    """The concepts of a finished run, in the order in which they were erased."""

    run: Path
    teacher: str
    concepts: tuple[Erased, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(concept.name for concept in self.concepts)


def read(run: Path) -> History:
    """Read what a finished run erased; banks are absolute afterwards.

    Raises:
        UserError: There is no run, it has not ended, it erased nothing, or its record is broken.
    """
    if not (run / "config.json").is_file():
        raise UserError(f"--resume-concepts {run} is no run folder: config.json is missing")
    if not (run / "student").is_dir() or not (run / "summary.json").is_file():
        raise UserError(f"--resume-concepts {run} has not ended; finish it first, with --resume --out {run}")
    path = run / RECORD
    if not path.is_file():
        raise UserError(f"--resume-concepts {run} has erased nothing: {RECORD} is missing")
    fields = read_json(path)
    if (fields.get("format"), fields.get("version")) != (_FORMAT, _VERSION):
        found = f"{fields.get('format')!r}, version {fields.get('version')!r}"
        raise UserError(f"{path} is {found}; this release reads {_FORMAT!r}, version {_VERSION}")
    try:
        if any(type(c["bank"]) is not str or "\0" in c["bank"] for c in fields["concepts"]):
            raise TypeError("a bank is no path")
        concepts = tuple(Erased(str(c["name"]), str(run / c["bank"]), float(c["weight"])) for c in fields["concepts"])
        history = History(run, str(fields["teacher"]), concepts)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} does not hold what a record of concepts holds ({error})") from error
    if not concepts or not all(0 < concept.weight < float("inf") for concept in concepts):
        raise UserError(f"{path} names no concept, or one without a positive weight")
    return history


def check_teacher(history: History, fingerprint: str) -> None:
    """Refuse to go on with another teacher than the run's: its banks and its student are of that one.

    Raises:
        UserError: It is another one.
    """
    if not same_component(history.teacher, fingerprint):
        raise UserError(
            f"--resume-concepts {history.run} had the teacher {history.teacher}, this is {fingerprint}; wanted the same"
        )


def to_json(out: Path, teacher: str, concepts: Sequence[Erased]) -> dict[str, Any]:
    """The content of `concepts.json` in the run folder `out`."""
    rows = []
    for concept in concepts:
        bank, home = Path(os.path.abspath(concept.bank)), Path(os.path.abspath(out))
        near = bank.is_relative_to(home)
        rows.append(asdict(concept) | {"bank": str(bank.relative_to(home) if near else bank)})
    return {"format": _FORMAT, "version": _VERSION, "teacher": teacher, "concepts": rows}


def open_banks(concepts: Sequence[Erased]) -> list[Cache]:
    """The banks of an earlier run.

    Raises:
        UserError: One is no longer where it was.
    """
    banks = []
    for concept in concepts:
        try:
            banks.append(Cache.open(concept.bank))
        except UserError as error:
            raise UserError(f"the bank of {concept.name!r}, which an earlier run has erased: {error}") from error
    return banks


def together(
    concepts: Sequence[Erased], banks: Sequence[LatentSource], data: LatentSource, earlier: int
) -> LatentSource:
    """All banks as one source, after a look at what clashes; the only one as it is.

    Args:
        concepts, banks: Those of an earlier run first.
        data: Of the lower level.
        earlier: How many are of an earlier run.

    Raises:
        UserError: The same phrase, or the same caption, is erased twice.
    """
    erased = [phrases(bank) for bank in banks]
    said = [{*some, *(plain(pair.erase) for pair in pairs_of(bank))} for some, bank in zip(erased, banks, strict=True)]
    for (i, one), (j, other) in itertools.combinations(enumerate(concepts), 2):
        if both := sorted(said[i] & said[j], key=len):
            already = f"was erased by an earlier run ({one.name})" if i < earlier else f"{one.bank} erases as well"
            raise UserError(f"{other.bank} erases {both[0]!r}, which {already}; wanted each once")
    for i, bank in enumerate(banks):
        others = [phrase for j, some in enumerate(erased) if j != i for phrase in some]
        guides = (pair.guide for pair in pairs_of(bank) if held(pair.guide, others) is not None)
        if (guide := next(guides, None)) is not None:
            _log.warning("%s: anchor %r holds a phrase that is to be erased, too", concepts[i].name, guide)
    count, seen, example = clashes_of(data, [phrase for some in erased for phrase in some])
    if count:
        text = "%d of %d lower captions hold a phrase to erase, such as %r: the levels work against each other"
        _log.warning(text, count, seen, example)
    if len(banks) == 1:
        return banks[0]
    total = sum(concept.weight for concept in concepts)
    shares = ", ".join(f"{c.name} {c.weight / total:.0%}" for c in concepts)
    _log.info("%d concepts share the upper batches: %s", len(concepts), shares)
    return Blend([c.name for c in concepts], banks, [c.weight for c in concepts])
