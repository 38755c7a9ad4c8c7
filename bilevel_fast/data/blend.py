"""Several sources as one, of which every batch takes shares by weight, however large each source is.

Which source sample g of a run comes from is a pure function of g and the weights, and no source is ever a whole sample
ahead of its share or behind it: Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980). So
batches of 16 for two equal concepts hold 8 of each, and a resumed run sees the same batches.

Shape legend: B batch, V views, C latent channels, H W latent size.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.sources import LatentSource


class Shares:
    """Which part each sample of a run belongs to, and how many samples of that part come before it.

    With x_i samples so far of a part of weight w_i (they sum up to 1), sample g goes to the part whose next one is due
    first, (x_i + 1 - e) / w_i, among those that are not ahead, w_i (g + 1) - x_i >= e, with e = 1 / (2 n - 2).

    Args:
        weights: Of the n parts, positive.
    """

    def __init__(self, weights: Sequence[float]):
        total = sum(weights)
        self.weights = tuple(weight / total for weight in weights)
        self._found: list[tuple[int, int]] = []
        self._counts = [0] * len(weights)

    def __call__(self, sample: int) -> tuple[int, int]:
        if len(self.weights) == 1:
            return 0, sample
        early = 1 / (2 * len(self.weights) - 2) - 1e-9  # ties are not for rounding errors to decide
        while len(self._found) <= sample:
            after, counts = len(self._found) + 1, self._counts
            parts = [i for i, weight in enumerate(self.weights) if weight * after - counts[i] >= early]
            part = min(parts, key=lambda i: (counts[i] + 1 - early) / self.weights[i])
            self._found.append((part, counts[part]))
            counts[part] += 1
        return self._found[sample]


class Blend:
    """A `LatentSource` of several, one after the other; `data.batches.Batches` draws from it by weight.

    Args:
        names: Of the sources, for messages.
        sources: At least one.
        weights: Positive; what share of the samples comes from each.

    Raises:
        UserError: Latents of two sources differ in shape, or in how many views there are.
    """

    def __init__(self, names: Sequence[str], sources: Sequence[LatentSource], weights: Sequence[float]):
        assert len(names) == len(sources) == len(weights) > 0
        first = sources[0]
        for name, source in zip(names, sources, strict=True):
            for what in ("latent_shape", "views"):
                ours, theirs = getattr(source, what), getattr(first, what)
                if ours != theirs:
                    raise UserError(f"{name} has {what.replace('_', ' ')} {ours}, {names[0]} has {theirs}")
        self.names, self.sources, self.weights = tuple(names), tuple(sources), tuple(weights)
        self.starts = [0, *accumulate(map(len, sources))]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.sources[0].latent_shape

    @property
    def views(self) -> int:
        return self.sources[0].views

    def __len__(self) -> int:
        return self.starts[-1]

    def moments(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        rows = zip(map(self._locate, indices), views, strict=True)
        return torch.cat([source.moments([index], [view]) for (source, index), view in rows])

    def sizes(self, indices: Sequence[int], views: Sequence[int]) -> Tensor | None:
        """None if a source of these samples has none."""
        rows = zip(map(self._locate, indices), views, strict=True)
        found = [source.sizes([index], [view]) for (source, index), view in rows]
        known = [each for each in found if each is not None]
        return torch.cat(known) if len(known) == len(found) else None

    def captions(self, index: int) -> tuple[str, ...]:
        source, index = self._locate(index)
        return source.captions(index)

    def anchor(self, index: int) -> str | None:
        source, index = self._locate(index)
        return source.anchor(index)

    def _locate(self, index: int) -> tuple[LatentSource, int]:
        assert 0 <= index < len(self), f"sample {index} of {len(self)}"
        part = bisect_right(self.starts, index) - 1
        return self.sources[part], index - self.starts[part]


def parts_of(source: LatentSource) -> tuple[LatentSource, ...]:
    """The sources of a mixture, or the only one."""
    return source.sources if isinstance(source, Blend) else (source,)


def weights_of(source: LatentSource) -> tuple[float, ...]:
    """The weights of a mixture; 1 of the only source."""
    return source.weights if isinstance(source, Blend) else (1.0,)
