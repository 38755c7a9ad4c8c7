"""What a training step starts from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bilevel_fast.ops.randomness import Stream, integers, normal

LEVEL_STRIDE = 2**40
"""Distance between the global indices of two levels: no run draws as many samples."""

TENSORS = ("latents", "text", "anchor", "eps", "t")
"""The fields of a `Batch` that lie on the device in a step."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What a training step starts from. `Batches` leaves it where it was made; a `Loader` brings it to the device."""

    latents: Tensor
    """(B, C, H, W) fp32, scaled."""
    text: Tensor
    """(B, L, D) fp32 states of the captions; (B, L + R, D) with what else a model reads (`models.conditioning`)."""
    anchor: Tensor | None
    """The same of the captions without the concept, or of the null prompt."""
    index: Tensor
    """(B,) int64 global indices, on the CPU: what is random about a sample is drawn by its index."""
    eps: Tensor | None = None
    """(B, C, H, W) fp32 standard normal noise; None until it is drawn."""
    t: Tensor | None = None
    """(B,) int64 timesteps; None until they are drawn."""
    captions: tuple[str, ...] = ()
    """The B captions that `text` holds the states of; empty where nobody wrote them down."""

    def drawn(self, seed: int, timesteps: int) -> "Batch":
        """With noise and timesteps in [0, timesteps), next to the latents; itself if it has them already."""
        if self.eps is not None and self.t is not None:
            return self
        eps = normal(seed, Stream.NOISE, self.index, tuple(self.latents.shape[1:]))
        t = integers(seed, Stream.TIMESTEP, self.index, timesteps)
        device = self.latents.device
        return replace(self, eps=eps.to(device), t=t.to(device))

    def split(self, images: int) -> "tuple[Batch, ...]":
        """Parts of so many images each, in order, as views; itself if that is all of them."""
        count = len(self.latents)
        if images == count:
            return (self,)
        return tuple(self._rows(start, start + images) for start in range(0, count, images))

    def _rows(self, start: int, end: int) -> "Batch":
        part = self.map(lambda x: x[start:end])
        return replace(part, index=self.index[start:end], captions=self.captions[start:end])

    @classmethod
    def join(cls, parts: "Sequence[Batch]") -> "Batch":
        """One batch of several, in order, before noise and timesteps are drawn; itself if there is one."""
        first, *others = parts
        if not others:
            return first
        anchors = [part.anchor for part in parts if part.anchor is not None]
        return cls(
            torch.cat([part.latents for part in parts]),
            torch.cat([part.text for part in parts]),
            torch.cat(anchors) if anchors else None,
            torch.cat([part.index for part in parts]),
            captions=tuple(caption for part in parts for caption in part.captions),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """With every tensor but `index` replaced by `function` of it."""
        fields = {name: getattr(self, name) for name in TENSORS}
        return replace(self, **{name: function(x) for name, x in fields.items() if x is not None})
