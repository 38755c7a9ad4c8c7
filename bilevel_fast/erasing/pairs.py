"""What is to be erased and what should stand in its place: pairs of texts, alone or in sentences, and their checks."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.text_encoder import TextEncoder, indistinct
from bilevel_fast.sampling.prompt_table import read_table
from bilevel_fast.sampling.prompts import same_text

_COLUMNS = ("erase", "guide")
_BATCH = 256


@dataclass(frozen=True)
class Pair:
    """A text, and the text that the model should take it for."""

    erase: str
    guide: str = ""
    """Empty is the null prompt."""
    weight: float = 1.0
    """Of its error among the others'."""

    def __post_init__(self) -> None:
        if not self.erase.strip():
            raise UserError(f"erase {self.erase!r} is empty; wanted a text")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UserError(f"erase {self.erase!r} has weight {self.weight}; wanted a positive number")


@dataclass(frozen=True)
class Frame:
    """A sentence for a concept, `{}` in its place: `a photo of a {} man`, `a red star {}`.

    Attributes:
        erase: Where the erased text is put.
        guide: Where the guide is put; the same sentence, unless a base sentence is worded otherwise.
    """

    erase: str
    guide: str

    @classmethod
    def of(cls, subject: str) -> "Frame":
        """A subject without `{}` is followed by the concept."""
        sentence = subject if "{}" in subject else f"{subject} {{}}"
        return cls(sentence, sentence)


def make_pairs(erase: Sequence[str], guide: Sequence[str] = ("",), weights: Sequence[float] = ()) -> tuple[Pair, ...]:
    """Pairs from three lists: one guide serves all texts, and no weights are ones.

    Raises:
        UserError: The lists do not fit each other, or a pair is none.
    """
    if not erase:
        raise UserError("there is nothing to erase; --erase or --pairs names texts")
    if len(guide) not in (1, len(erase)):
        raise UserError(f"{len(guide)} guides came for {len(erase)} texts to erase; wanted one each, or one for all")
    if weights and len(weights) != len(erase):
        raise UserError(f"{len(weights)} weights came for {len(erase)} texts to erase; wanted one each")
    guides = list(guide) * len(erase) if len(guide) == 1 else guide
    return tuple(Pair(*row) for row in zip(erase, guides, weights or [1.0] * len(erase), strict=True))


def read_pairs(path: Path) -> tuple[Pair, ...]:
    """Read a CSV file with the columns `erase` and `guide`, and perhaps `weight`.

    Raises:
        UserError: The file is missing, not UTF-8, lacks a column, holds no pair, has a weight that is none, or a row
            with more or fewer cells than the header. The line is named.
    """
    table = read_table(path, "pair file")
    table.want(*_COLUMNS)
    pairs: list[Pair] = []
    for line, cells in table.rows:
        weight = cells.get("weight") or "1"
        try:
            pairs.append(Pair(cells["erase"], cells["guide"], float(weight)))
        except UserError as error:
            raise UserError(f"pair file {path}, line {line}: {error}") from error
        except ValueError as error:
            raise UserError(f"pair file {path}, line {line}: weight {weight!r} is no number") from error
    if not pairs:
        raise UserError(f"pair file {path} holds no pair")
    return tuple(pairs)


def framed(pairs: Iterable[Pair], frames: Iterable[Frame]) -> tuple[Pair, ...]:
    """Every pair in every sentence, pair by pair. An empty guide leaves no gap and no comma behind."""
    frames = list(frames)
    return tuple(
        Pair(_put(frame.erase, pair.erase), _put(frame.guide, pair.guide), pair.weight)
        for pair in pairs
        for frame in frames
    )


def _put(sentence: str, text: str) -> str:
    return " ".join(sentence.replace("{}", text).split()).replace(" ,", ",").strip(" ,")


def check(pairs: Sequence[Pair], preserve: Sequence[str], encoder: TextEncoder) -> None:
    """Refuse what cannot be carried out.

    Raises:
        UserError: A text to erase is its own guide, or to the text encoder the same; is there twice, should also be
            preserved, or has no tokens.
    """
    seen: set[str] = set()
    kept = set(map(same_text, preserve))
    for pair in pairs:
        name = same_text(pair.erase)
        if name == same_text(pair.guide):
            raise UserError(f"erase {pair.erase!r} has itself as its guide, which changes nothing; wanted another text")
        if name in seen:
            raise UserError(f"erase {pair.erase!r} is there twice; wanted each text once")
        if name in kept:
            raise UserError(f"{pair.erase!r} is to be erased and preserved; wanted one of the two")
        seen.add(name)
    for pair, last in zip(pairs, last_words(encoder, [pair.erase for pair in pairs]), strict=True):
        if last < 1:
            raise UserError(f"erase {pair.erase!r} has no tokens for the text encoder; wanted a word that it knows")
    for row in indistinct(encoder, [pair.erase for pair in pairs], [pair.guide for pair in pairs]):
        raise UserError(
            f"erase {pairs[row].erase!r} and its guide {pairs[row].guide!r} are the same to the text encoder; wanted "
            f"texts that differ within its {encoder.length} tokens"
        )


def last_words(encoder: TextEncoder, texts: Sequence[str]) -> list[int]:
    """Where the last token of each text stands, before the one that ends it; 0, the begin token, if it has none."""
    places: list[int] = []
    for start in range(0, len(texts), _BATCH):
        places += (encoder.mask(texts[start : start + _BATCH]).sum(1) - 2).tolist()
    return places
