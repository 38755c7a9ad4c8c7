"""What a concept bank says that its anchors do not: phrases, pairs of texts, and what clashes with them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile

from bilevel_fast.data.sources import LatentSource
from bilevel_fast.erasing.pairs import Pair
from bilevel_fast.sampling.prompts import same_text

_LOOKED_FOR = 64  # phrases that are looked for in other captions, the most frequent ones

_LOOKED_AT = 20_000  # samples of the lower data, spread over all of it


def span(caption: str, anchor: str) -> tuple[int, int]:
    """Which words of a caption lie between what it and its anchor begin and end with: first, and one after the last."""
    words, rest = ([plain(word) for word in text.split()] for text in (caption, anchor))
    before = _agree(words, rest)
    after = _agree(words[before:][::-1], rest[before:][::-1])
    return before, len(words) - after


def pairs_of(bank: LatentSource, to_null: bool = False) -> tuple[Pair, ...]:
    """Every caption of a bank once, with its anchor as guide; or with the null prompt."""
    found: dict[str, Pair] = {}
    for caption, anchor in _samples(bank):
        found.setdefault(same_text(caption), Pair(caption, "" if to_null else anchor))
    return tuple(found.values())


def phrases(bank: LatentSource) -> tuple[str, ...]:
    """What captions have and their anchors lack, in lower case and without the marks around it; most frequent first."""
    counts: Counter[str] = Counter()
    for caption, anchor in _samples(bank):
        first, last = span(caption, anchor)
        counts[plain(" ".join(caption.split()[first:last]))] += 1
    del counts[""]
    return tuple(phrase for phrase, _ in counts.most_common())


def plain(text: str) -> str:
    """Lower case, single spaces, and no punctuation at the ends of words."""
    words = (word.strip(".,;:!?()\"'") for word in text.casefold().split())
    return " ".join(word for word in words if word)


def held(text: str, erased: Sequence[str]) -> str | None:
    """The first of some phrases that a text holds as whole words, if it does."""
    text = f" {plain(text)} "
    return next((phrase for phrase in erased[:_LOOKED_FOR] if f" {phrase} " in text), None)


def captions_of(source: LatentSource, limit: int, erased: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """Up to `limit` different captions, from samples all over a source, and how many had to be left out.

    Left out are those that hold an erased phrase: nobody can keep and erase them.
    """
    found: dict[str, None] = {}
    clashes = 0
    stride = max(1, len(source) // max(1, limit))
    order = (i for first in range(stride) for i in range(first, len(source), stride))
    for index in order:
        for caption in source.captions(index):
            if held(caption, erased) is not None:
                clashes += 1
            elif caption.strip():
                found[caption] = None
            if len(found) == limit:
                return tuple(found), clashes
    return tuple(found), clashes


def clashes_of(source: LatentSource, erased: Sequence[str]) -> tuple[int, int, str]:
    """How many of how many samples of a source have a caption that holds an erased phrase, and the first of these."""
    stride = -(-len(source) // _LOOKED_AT)
    indices = range(0, len(source), stride)
    found = [caption for i in indices for caption in source.captions(i)[:1] if held(caption, erased) is not None]
    return len(found), len(indices), found[0] if found else ""


def _samples(bank: LatentSource) -> Iterator[tuple[str, str]]:
    for index in range(len(bank)):
        anchor = bank.anchor(index)
        assert anchor is not None, "a bank has anchors"
        yield bank.captions(index)[0], anchor


def _agree(a: Sequence[str], b: Sequence[str]) -> int:
    """How many words two texts have in common at their beginnings."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
