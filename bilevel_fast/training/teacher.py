"""The teacher of a training step: the frozen dense UNet.

`predict` serves the lower level; `steered` gives the upper level its target, from concept and anchor in one call.

Two savings are not taken, for what they are worth at SD 2.1, 512 px. Keys and values of fixed prompts, kept, would save
1.97 of the forward pass's 402.8 GMAC, 0.1 % of a lower step. Block outputs that are dropped as soon as `feature_kd` has
seen them would save 12.6 MB an image, if the upper level's penalty did not want them again.
"""

import copy
from typing import Self

import torch
from torch import Tensor, nn

from bilevel_fast.models.diffusion import Noised
from bilevel_fast.models.unet import Prediction, UNet
from bilevel_fast.scale.team import Team
from bilevel_fast.training.losses import suppression_target
from bilevel_fast.training.phases import phase
from bilevel_fast.training.units import Units


class Teacher:
    """A frozen UNet that counts the images it has seen, so that a test can hold the engine to reusing its answers.

    Attributes:
        images: Images that went through the UNet; `steered` sends two per sample. () int64 on the device, so that it
            counts the replays of a CUDA graph as well.
    """

    def __init__(self, unet: UNet):
        self.unet = unet.eval().requires_grad_(False)
        self.images = torch.zeros((), dtype=torch.int64, device=unet.conv_in.weight.device)

    @classmethod
    def of(cls, unet: UNet, device: torch.device, dtype: torch.dtype) -> Self:
        """A teacher that computes on `device` in `dtype`: `unet` itself where it does so already, else a copy of it."""
        weight = unet.conv_in.weight
        if weight.device == torch.empty(0, device=device).device and weight.dtype == dtype:  # cuda is cuda:0
            return cls(unet)
        # parameter by parameter: there is never a second copy in the dtype that it has
        moved: dict[int, Tensor] = {id(p): nn.Parameter(p.detach().to(device, dtype)) for p in unet.parameters()}
        return cls(copy.deepcopy(unet, moved))

    @classmethod
    def in_parts(cls, unet: UNet, device: torch.device, dtype: torch.dtype, team: Team) -> Self:
        """The same of `unet`, which stays as it is, but that each rank of `team` holds a part of it (`units`).

        All ranks ask it the same number of times.
        """
        empty: dict[int, Tensor] = {
            id(p): nn.Parameter(torch.empty(0, dtype=dtype, device=device)) for p in unet.parameters()
        }
        teacher = cls(copy.deepcopy(unet, empty))
        Units.frozen(teacher.unet, dict(unet.named_parameters()), device, dtype, team)
        return teacher

    def share_out(self, device: torch.device, dtype: torch.dtype, team: Team) -> None:
        """The same of this teacher itself."""
        Units.frozen(self.unet, dict(self.unet.named_parameters()), device, dtype, team)
        self.images = self.images.to(device)

    def predict(self, noised: Noised, text: Tensor) -> Prediction:
        """Output and block outputs for text states (B, L, D)."""
        return self._ask(noised.x, noised.t, text)

    def steered(self, x: Tensor, t: Tensor, text: Tensor, anchor: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        """Negative guidance a - eta * (c - a), (B, C, H, W), for any x_t (B, C, H, W) and t (B,); and c.

        `c` and `a` are the outputs for the concept `text` and the `anchor`, both (B, L, D), computed as one batch
        of 2B. With the null prompt as anchor it is the target of ESD (arXiv:2303.07345, eq. 8).
        """
        with phase("teacher"):
            both = self._ask(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([text, anchor])).out
            concept_out, anchor_out = both.chunk(2)
            return suppression_target(anchor_out, concept_out, eta), concept_out

    @torch.no_grad()
    def _ask(self, x: Tensor, t: Tensor, text: Tensor) -> Prediction:
        with phase("teacher"):
            self.images.add_(len(text))
            return self.unet(x, t, text)
