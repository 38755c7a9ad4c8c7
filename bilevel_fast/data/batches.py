"""Batches as a pure function of (seed, step): which samples, which view and caption, which latents of the posterior.

Sample number g of a run (its *global index*: step * batch size + row) decides everything that is random about it, so
a resumed run sees the same batches, and so does a run whose batches are split over several ranks.

Shape legend: B batch, C latent channels, H W latent size, L text tokens, D text width, R further rows of text
(`models.conditioning`), N samples of the source.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel_fast.base.devices import ONE, Ranks
from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.data.batch import LEVEL_STRIDE, Batch
from bilevel_fast.data.blend import Shares, parts_of, weights_of
from bilevel_fast.data.sources import LatentSource
from bilevel_fast.models.conditioning import with_sizes
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.ops.randomness import Stream, integers, normal, permutation, uniform

Anchor = Literal["none", "null", "phrase"]

_PART_STRIDE = 2**30
"""Distance between the numbers of two parts' epochs."""


class Batches:
    """Draws batches from a source, every sample once per epoch, in another order each epoch.

    Of a `Blend`, each source has epochs of its own, and a share of every batch by its weight.
    """

    def __init__(
        self,
        source: LatentSource,
        text_encoder: TextEncoder,
        batch_size: int,
        seed: int,
        *,
        level: int = 0,
        p_uncond: float = 0.0,
        anchor: Anchor = "none",
        max_states: int = 1024,
        leaves: int = 1,
        ranks: Ranks = ONE,
    ) -> None:
        """Set up; reads captions, no latents.

        Args:
            source: Where latents and captions come from.
            text_encoder: Frozen.
            batch_size: B, of all ranks together.
            seed: Of the run.
            level: Levels share no random numbers although they share the seed: 0 lower, 1 upper.
            p_uncond: Probability that a caption is replaced by the null prompt.
            anchor: What `Batch.anchor` holds: nothing, the null prompt, or the caption without the concept.
            max_states: A source with at most so many different captions is encoded once, at the first batch.
            leaves: Equal parts that B consists of, each made by itself: its bits do not know who makes the others.
            ranks: Which of the parts are made here.

        Raises:
            UserError: A setting is out of range, or the source has no captions without the concept.
        """
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}; it must be positive")
        if not 0 <= p_uncond <= 1:
            raise UserError(f"p_uncond is {p_uncond}; it is a probability")
        if anchor not in get_args(Anchor):
            raise UserError(f"anchor {anchor!r} does not exist{nearest(anchor, get_args(Anchor))}")
        if anchor != "none" and p_uncond:
            # Steering the null prompt away from itself would bend every guided sample.
            raise UserError(f"p_uncond is {p_uncond}, but captions that have an anchor are never dropped; set it to 0")
        if anchor == "phrase" and source.anchor(0) is None:
            raise UserError("anchor 'phrase' wants a bank of concepts; the source has captions only")
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.p_uncond, self.anchor = p_uncond, anchor
        self._leaf_size, self._leaves = batch_size // leaves, ranks.leaves(leaves)
        self._offset, self._pooled = level * LEVEL_STRIDE, text_encoder.pooled
        self._states = _TextStates(text_encoder, source, batch_size, max_states)
        self._shares, self._lengths = Shares(weights_of(source)), [len(part) for part in parts_of(source)]
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}

    def __call__(self, step: int) -> Batch:
        """The batch of a step, or those of its parts that are made here."""
        return Batch.join([self._leaf(step, leaf) for leaf in self._leaves])

    def _leaf(self, step: int, leaf: int) -> Batch:
        start = step * self.batch_size + leaf * self._leaf_size
        samples = range(start, start + self._leaf_size)
        index = torch.as_tensor(samples, dtype=torch.int64) + self._offset
        positions = [self._position(sample) for sample in samples]
        captions = self._captions(positions, index)
        views = integers(self.seed, Stream.VIEW, index, self.source.views).tolist()
        latents, anchors = self._latents(positions, views, index), self._anchors(positions)
        text = self._sized(self._states(captions), positions, views)
        return Batch(latents, text, anchors, index, captions=tuple(captions))

    def _position(self, sample: int) -> int:
        """Where in the source the sample lies."""
        part, number = self._shares(sample)
        epoch, place = divmod(number, self._lengths[part])
        if (part, epoch) not in self._orders:
            for old in [key for key in self._orders if key[0] == part][:-1]:  # one batch may lie across two epochs
                del self._orders[old]
            key = self._offset + part * _PART_STRIDE + epoch
            self._orders[part, epoch] = permutation(self.seed, Stream.SHUFFLE, key, self._lengths[part])
        return sum(self._lengths[:part]) + int(self._orders[part, epoch][place])

    def _captions(self, positions: list[int], index: Tensor) -> list[str]:
        choices = [self.source.captions(position) for position in positions]
        # In fp64: a 24-bit fraction times a count must not round up to the count.
        fractions = uniform(self.seed, Stream.CAPTION, index).double().tolist()
        captions = [options[int(u * len(options))] for options, u in zip(choices, fractions, strict=True)]
        if not self.p_uncond:
            return captions
        dropped = (uniform(self.seed, Stream.DROPOUT, index) < self.p_uncond).tolist()
        return ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]

    def _sized(self, text: Tensor, positions: list[int], views: list[int]) -> Tensor:
        """With the size numbers of the pictures, if the model reads any and the source knows them.

        Anchors are of banks, whose pictures are of the model's own size.
        """
        sizes = self.source.sizes(positions, views) if self._pooled else None
        return text if sizes is None else with_sizes(text, self._pooled, sizes)

    def _latents(self, positions: list[int], views: list[int], index: Tensor) -> Tensor:
        mean, logvar = self.source.moments(positions, views).chunk(2, dim=1)
        eps = normal(self.seed, Stream.POSTERIOR, index, self.source.latent_shape)
        return mean + torch.exp(0.5 * logvar) * eps

    def _anchors(self, positions: list[int]) -> Tensor | None:
        if self.anchor == "none":
            return None
        if self.anchor == "null":
            # rows of their own: nothing can write to those of an expanded tensor, such as a copy to pinned memory
            return self._states.null.repeat(len(positions), 1, 1)
        return self._states([self.source.anchor(position) or "" for position in positions])


class _TextStates:
    """Encodes captions; few different ones are encoded once and looked up.

    The last bits of a state may depend on the batch it was encoded in, so a state must never depend on which batches
    came before: either all captions of the source are encoded up front, in an order that the source decides, or each
    batch encodes its own. A cache filled on demand would break `a resumed run is the same run`.
    """

    def __init__(self, encoder: TextEncoder, source: LatentSource, batch_size: int, limit: int) -> None:
        self._encoder = encoder
        self._batch_size = batch_size
        self._captions = _few_captions(source, limit)
        self._rows: dict[str, int] = {}
        self._table: Tensor | None = None
        self._null: Tensor | None = None

    @property
    def null(self) -> Tensor:
        """(1, L + R, D) text tensor of the null prompt."""
        if self._null is None:
            self._null = self._encoder.encode([""])
        return self._null

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, L + R, D)."""
        if self._captions is None:
            return self._encoder.encode(captions)
        if self._table is None:
            every, size = self._captions, self._batch_size
            chunks = [self._encoder.encode(every[i : i + size]) for i in range(0, len(every), size)]
            self._table = torch.cat(chunks)
            self._rows = {caption: row for row, caption in enumerate(every)}
        rows = torch.tensor([self._rows[caption] for caption in captions])
        return self._table[rows.to(self._table.device, non_blocking=True)]


def _few_captions(source: LatentSource, limit: int) -> list[str] | None:
    """The different captions and anchors of a source and the null prompt, or None if they are more than `limit`."""
    found = {"": None}
    for position in range(len(source)):
        found |= dict.fromkeys(_texts(source, position))
        if len(found) > limit:
            return None
    return list(found)


def _texts(source: LatentSource, position: int) -> Iterable[str]:
    yield from source.captions(position)
    anchor = source.anchor(position)
    if anchor is not None:
        yield anchor
