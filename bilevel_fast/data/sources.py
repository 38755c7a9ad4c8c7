"""Where batches read latents and captions from: anything that keeps this protocol, on disk or in memory.

Shape legend: N samples, V views (crops and flips of one image), C latent channels, H W latent size.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError

EXACT_LOGVAR = -30.0
"""The log-variance of a latent that is known, not estimated: the floor to which diffusers clamps a posterior."""


class LatentSource(Protocol):
    """Samples that training may read in any order, each with the posterior of its latents and its captions."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    @property
    def views(self) -> int:
        """How many crops and flips of each image there are."""
        ...

    def __len__(self) -> int: ...

    def moments(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Mean and log-variance of the scaled latents of one view of each sample: (B, 2C, H, W) fp32 on the CPU."""
        ...

    def sizes(self, indices: Sequence[int], views: Sequence[int]) -> Tensor | None:
        """Size numbers (B, 6) fp32 on the CPU of one view of each sample (`models.conditioning`).

        None where nobody wrote them down; then those of a text encoder, the model's own size, stand.
        """
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample, at least one."""
        ...

    def anchor(self, index: int) -> str | None:
        """The caption without the concept; None if the sample stands for no concept."""
        ...


class MemorySource:
    """A `LatentSource` whose samples are all in memory."""

    def __init__(
        self, moments: Tensor, captions: Sequence[Sequence[str]], anchors: Sequence[str] | None = None
    ) -> None:
        """Wrap tensors.

        Args:
            moments: (N, V, 2C, H, W), float.
            captions: The captions of each sample.
            anchors: For samples of a concept: the caption of each without the concept.

        Raises:
            UserError: The shapes or lengths do not fit together, or a sample has no caption.
        """
        if moments.ndim != 5 or moments.shape[2] % 2 or 0 in moments.shape:
            raise UserError(f"moments have shape {tuple(moments.shape)}, wanted (N, V, 2C, H, W)")
        lengths = {"captions": len(captions)} | ({} if anchors is None else {"anchors": len(anchors)})
        for name, length in lengths.items():
            if length != len(moments):
                raise UserError(f"{length} {name} came for {len(moments)} samples")
        for index, choices in enumerate(captions):
            if isinstance(choices, str) or not choices:
                raise UserError(f"sample {index} wants a list of one or more captions, got {choices!r}")
        self._moments = moments
        self._captions = [tuple(choices) for choices in captions]
        self._anchors = anchors

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        _, _, doubled, height, width = self._moments.shape
        return doubled // 2, height, width

    @property
    def views(self) -> int:
        return self._moments.shape[1]

    def __len__(self) -> int:
        return len(self._moments)

    def moments(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        return self._moments[torch.as_tensor(indices), torch.as_tensor(views)].float()

    def sizes(self, indices: Sequence[int], views: Sequence[int]) -> Tensor | None:
        return None

    def captions(self, index: int) -> tuple[str, ...]:
        return self._captions[index]

    def anchor(self, index: int) -> str | None:
        return None if self._anchors is None else self._anchors[index]


def exact_moments(latents: Tensor) -> Tensor:
    """The moments (N, 1, 2C, H, W) of latents (N, C, H, W) that are known exactly."""
    return torch.cat([latents, torch.full_like(latents, EXACT_LOGVAR)], dim=1)[:, None]
