"""Which rows of a flat buffer are whose, and sums whose bits do not know how many ranks there are.

A buffer (N,) is cut into buckets, and a bucket into as many runs of rows as there are ranks: rank r has the r-th run of
every bucket, side by side in its (m,). A bucket is what is sent at once. The last one may end in padding that the
buffer has not: it is zero, never saved, and no norm sees it.

A sum over leaves (equal parts of a batch) is a fixed binary tree, nearest neighbours first, in fp32. A rank adds up its
own leaves (`Counter`), and then everyone's sums for its own rows (`tree`). Where there is a power of two of leaves for
each rank, these are the inner nodes of one and the same tree, whoever computes them. Communication moves bytes and adds
nothing, so no choice of a library can change a bit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

ROW = 2**16
"""Elements of a row."""
BUCKET = 576
"""Rows that are sent at once, at most: 75 MB in bf16. 2^6 9 of them, which most numbers of ranks divide."""


@dataclass(frozen=True)
class Bucket:
    """A stretch of a buffer (N,), in elements: `world` runs of `size` from `start`; a rank keeps its one at `mine`."""

    start: int
    mine: int
    size: int
    world: int

    def whole(self, buffer: Tensor) -> Tensor:
        """All runs, (world size,), of a buffer (N,)."""
        return buffer[self.start : self.start + self.world * self.size]

    def run(self, buffer: Tensor, rank: int) -> Tensor:
        """A rank's run, (size,), of a buffer (N,)."""
        start = self.start + rank * self.size
        return buffer[start : start + self.size]

    def own(self, rows: Tensor) -> Tensor:
        """The run, (size,), in the (m,) of its rank."""
        return rows[self.mine : self.mine + self.size]


def buckets(size: int, world: int) -> list[Bucket]:
    """The buckets of a buffer of `size` elements, a multiple of `ROW`, among `world` ranks."""
    left, found, start, mine = size // ROW, list[Bucket](), 0, 0
    while left > 0:
        rows = min(max(BUCKET // world, 1), -(-left // world))
        found.append(Bucket(start, mine, rows * ROW, world))
        left, start, mine = left - rows * world, start + world * rows * ROW, mine + rows * ROW
    return found


@dataclass(frozen=True)
class Piece:
    """What a rank has of a stretch of (N,): `length` elements, at `mine` in its (m,), `after` the stretch's begin."""

    mine: int
    after: int
    length: int


def pieces(cut: Sequence[Bucket], rank: int, start: int, length: int) -> Iterator[Piece]:
    """What `rank` has of elements `start` to `start + length` of a buffer (N,)."""
    for bucket in cut:
        begin = bucket.start + rank * bucket.size
        first, last = max(begin, start), min(begin + bucket.size, start + length)
        if first < last:
            yield Piece(bucket.mine + first - begin, first - start, last - first)


def tree(parts: Sequence[Tensor]) -> Tensor:
    """The sum of tensors, fp32: neighbours first. A single one comes back as it is."""
    sums = list(parts)
    while len(sums) > 1:
        pairs = [a.float() + b.float() for a, b in zip(sums[::2], sums[1::2], strict=False)]
        sums = pairs + sums[len(pairs) * 2 :]
    return sums[0]


class Counter:
    """`tree` of leaves that come one after the other: a binary counter of partial sums, in buffers that stay.

    Args:
        leaves: How many come.

    A single leaf is not copied; of n leaves, log2(n) buffers hold the sums.
    """

    def __init__(self, leaves: int):
        self.leaves = leaves
        self._stack: list[tuple[int, Tensor]] = []
        self._free: list[Tensor] = []

    def add(self, leaf: Tensor) -> Tensor | None:
        """Take in a leaf, which may change afterwards; the sum of all after the last of them.

        What is returned holds until the next `add`.
        """
        stack = self._stack
        if sum(2**level for level, _ in stack) + 1 == self.leaves:
            total = self.last(leaf)
            self.clear()
            return total
        if stack and stack[-1][0] == 0:
            stack[-1] = (1, stack[-1][1].add_(leaf))
            while len(stack) > 1 and stack[-1][0] == stack[-2][0]:
                self._merge()
        else:
            buffer = self._free.pop() if self._free else leaf.float().clone()
            stack.append((0, buffer.copy_(leaf)))
        return None

    def last(self, leaf: Tensor, part: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """Of all leaves before and the last one, the sum of a part of them, that is asked for once.

        It holds until the `add` after `clear`, which follows when all parts were asked for.
        """
        total = part(leaf)
        for _, before in reversed(self._stack):
            total = part(before).add_(total)
        return total

    def clear(self) -> None:
        """Begin anew."""
        self._free += [buffer for _, buffer in self._stack]
        self._stack.clear()

    def _merge(self) -> None:
        _, last = self._stack.pop()
        level, before = self._stack.pop()
        self._free.append(last)
        self._stack.append((level + 1, before.add_(last)))
