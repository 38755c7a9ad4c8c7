"""Which units of a dense axis a pruned model keeps: GroupNorm groups, heads or FFN groups.

One list for the whole batch, or one for each sample, so that a batch may mix the experts of one dense storage.
Checked here, on the host and once; kernels trust it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGN = 16  # elements a row of the index is padded to, so that 16-byte loads of it are aligned


class Index(NamedTuple):
    """A `Kept` as kernels read it.

    Attributes:
        channels: (E, L) int32, the kept channels of each distinct list in ascending order; L is the longest list's
            length rounded up to 16, and what is past a list's own length repeats its last channel.
        counts: (E,) int32, kept channels of each list.
        rows: (B,) int32, the list of each sample.
        most: max(counts), known on the host.
    """

    channels: Tensor
    counts: Tensor
    rows: Tensor
    most: int


@dataclass(frozen=True)
class Kept:
    """Kept units of an axis of `units`.

    Attributes:
        units: Units of the dense axis.
        lists: The distinct lists, each strictly ascending, within 0..units-1, and not empty.
        rows: Which of the lists each sample uses; empty if all samples use lists[0].
    """

    units: int
    lists: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.lists:
            raise ValueError("kept: no list")
        if not self.rows and len(self.lists) > 1:
            raise ValueError(f"kept: {len(self.lists)} lists, and nothing says which sample uses which")
        for row in self.rows:
            if not 0 <= row < len(self.lists):
                raise ValueError(f"kept: row {row} of {len(self.lists)} lists")
        for units in self.lists:
            if not units:
                raise ValueError("kept: an empty list; drop the whole site instead")
            if any(type(u) is not int for u in units):
                raise ValueError(f"kept: {list(units)} are not whole numbers")
            if any(a >= b for a, b in pairwise(units)):
                raise ValueError(f"kept: {list(units)} is not strictly ascending")
            if units[0] < 0 or units[-1] >= self.units:
                raise ValueError(f"kept: {list(units)} is not within 0..{self.units - 1}")

    @classmethod
    def same(cls, units: int, kept: Sequence[int]) -> "Kept":
        """One list for the whole batch."""
        return cls(units, (tuple(kept),))

    @classmethod
    def per_sample(cls, units: int, kept: Sequence[Sequence[int]]) -> "Kept":
        """One list for each sample; equal ones are stored once, in the order in which they first appear."""
        lists = tuple(dict.fromkeys(tuple(x) for x in kept))
        return cls(units, lists, tuple(lists.index(tuple(x)) for x in kept))

    @property
    def is_everything(self) -> bool:
        return all(len(units) == self.units for units in self.lists)

    def samples(self, batch: int) -> tuple[int, ...]:
        """The list of each of `batch` samples.

        Raises:
            ValueError: There are lists for another number of samples.
        """
        if self.rows and len(self.rows) != batch:
            raise ValueError(f"kept: lists for {len(self.rows)} samples, the batch has {batch}")
        return self.rows or (0,) * batch

    def index(self, width: int, batch: int, device: torch.device) -> Index:
        """For units of `width` channels; kept on the device, so the copy is made once."""
        return _index(self, width, self.samples(batch), device)

    def encoded(self) -> list[int]:
        """As whole numbers, which a custom operator can take; `decoded` is the way back."""
        return [self.units, len(self.rows), *self.rows, *(n for units in self.lists for n in (len(units), *units))]

    def mask(self, width: int, batch: int, device: torch.device) -> Tensor:
        """(batch, units * width) bool, true where kept: what the references multiply by."""
        mask = torch.zeros(batch, self.units, dtype=torch.bool)
        for sample, row in enumerate(self.samples(batch)):
            mask[sample, list(self.lists[row])] = True
        return mask.repeat_interleave(width, dim=1).to(device)


def counts(kept: Kept | None, channels: int, batch: int) -> list[int]:
    """How many of `channels` each sample keeps; all of them for None."""
    if kept is None:
        return [channels] * batch
    return [len(kept.lists[row]) * (channels // kept.units) for row in kept.samples(batch)]


def vec(kept: Kept | None, channels: int) -> int:
    """Channels that are next to each other wherever a list has them: the power of two in a unit's width, 16 at most.

    Runs of so many start at a multiple of it, in a list as in memory: the compiler is told, and copies them whole.
    """
    width = channels // kept.units if kept else channels
    return min(width & -width, 16)


@lru_cache(maxsize=1024)
def decoded(numbers: tuple[int, ...]) -> Kept | None:
    """The `Kept` of which these are `encoded`; None of none."""
    if not numbers:
        return None
    units, count, *rest = numbers
    rows, lists = rest[:count], []
    rest = rest[count:]
    while rest:
        length, *rest = rest
        lists.append(tuple(rest[:length]))
        rest = rest[length:]
    return Kept(units, tuple(lists), tuple(rows))


@lru_cache(maxsize=1024)
def _index(kept: Kept, width: int, rows: tuple[int, ...], device: torch.device) -> Index:
    channels = [[u * width + i for u in units for i in range(width)] for units in kept.lists]
    most = max(map(len, channels))
    padded = [x + x[-1:] * (-(-most // _ALIGN) * _ALIGN - len(x)) for x in channels]
    tables = (padded, [len(x) for x in channels], list(rows))
    return Index(*(torch.tensor(x, dtype=torch.int32, device=device) for x in tables), most)
