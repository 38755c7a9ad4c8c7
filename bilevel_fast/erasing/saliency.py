"""SalUn (arXiv:2310.12508) and EraseDiff (arXiv:2401.05779): one loss, two ways to spare what should stay.

    L = mean (v_S(x_t, c) - sg v_S(x_t, a))^2

with concept prompt c, anchor prompt a and sg "without gradient": the concept should look to the student like its
anchor. Both papers add the loss on what remains: here that is the lower loss on the last lower batch.

SalUn moves only the parameters that the concept depends on (its eq. 3):

    m = 1(|grad L_f(theta_0)| >= gamma),   L_f = mean (v_S(x_t, c) - v)^2 on concept images, gamma a quantile of |grad|

EraseDiff lets the erasing gradient g into the retaining gradient r as far as a constraint asks. The direction nearest
to r whose product with g is at least barrier |g|^2 is

    d = r + lambda g,   lambda = max(0, barrier - <g, r> / |g|^2)

the dynamic barrier of BOME (arXiv:2209.08709), on which EraseDiff builds. Its constraint is L_f minus the value that
some inner steps would reach, and that value is a constant to its gradient; so no inner steps are made here. The
released script keeps lambda at a constant.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel_fast.data.batch import Batch
from bilevel_fast.erasing.references import Sourced
from bilevel_fast.models.unet import UNet
from bilevel_fast.training.losses import Loss, suppression_loss
from bilevel_fast.training.lower import Answers, descend
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.phases import phase
from bilevel_fast.training.teacher import Teacher

_log = logging.getLogger(__name__)


class Relabel(Sourced):
    """The loss of both: the concept's prompt gets the source's answer to the anchor's; the papers' source is `self`."""

    def loss(self, student: UNet, answers: Answers, batch: Batch) -> Loss:
        assert batch.anchor is not None, "an upper batch needs anchors"
        noised = answers.noise(batch)
        target = self.source.predict(noised, batch.anchor).out
        with phase("student"):
            out = student(noised.x, noised.t, batch.text).out
        with phase("losses"):
            self.look(answers, noised, batch, out, target)
            return suppression_loss(out, target)


class SalUn(Relabel):
    """Relabelling that holds all but the salient parameters still.

    The mask is made from the student before its first step. A checkpoint keeps it by parameter, a byte per element.

    Args:
        source: See `Relabel`.
        flat: The student's parameters.
        salient: (m,) bool, which of them move, in the order of `flat`.
    """

    def __init__(self, source: Teacher, flat: FlatParameters, salient: Tensor):
        super().__init__(source)
        self.flat, self.still = flat, ~salient

    def hold(self) -> None:
        self.flat.gradient.masked_fill_(self.still, 0)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"still": self.flat.state_dict(self.still)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.flat.load_state_dict(state["still"], self.still)  # in place: a CUDA graph looks where it lies


def salient(
    student: UNet,
    answers: Answers,
    flat: FlatParameters,
    batches: Callable[[int], Batch],
    count: int,
    share: float,
    micro: int | None = None,
) -> Tensor:
    """SalUn's mask (m,) bool: the `share` of the parameters with the largest |gradient| of L_f over `count` batches.

    Parameters that tie with the last of them move as well. Overwrites the gradient; reads the device.

    Args:
        micro: Images that are computed at once; a batch is a multiple of it. None: all of them.
    """
    total = torch.zeros_like(flat.master)

    def loss(batch: Batch) -> Loss:
        noised = answers.noise(batch)
        return Loss(F.mse_loss(student(noised.x, noised.t, batch.text).out.float(), noised.target), {})

    for step in range(count):
        parts = (batch := batches(step)).split(micro or len(batch.latents))
        descend((loss(part) for part in parts), len(parts), flat)
        total += flat.gradient
    every = sum(value.numel() for value in student.state_dict().values())  # without padding, whose gradient is zero
    kept = max(1, round(share * every))
    everyone = flat.gathered(total.abs_())
    mask = everyone >= everyone.kthvalue(len(everyone) - kept + 1).values
    _log.info("SalUn: %d of %d parameters move, by the gradient of %d concept batches", int(mask.sum()), every, count)
    return flat.own(mask)


class EraseDiff(Relabel):
    """Relabelling under EraseDiff's constraint; takes the place of the penalty.

    Args:
        source: See `Relabel`.
        barrier: How fast the constraint must fall, in squared norms of its gradient; 0 erases only where that costs
            the rest nothing.
    """

    def __init__(self, source: Teacher, barrier: float):
        super().__init__(source)
        self.barrier = barrier
        self.rule = self._constrain

    def _constrain(self, suppression: Tensor, flat: FlatParameters) -> None:
        square = flat.dot(suppression, suppression).clamp(min=torch.finfo(torch.float32).tiny)
        factor = (self.barrier - flat.dot(suppression, flat.gradient) / square).clamp(min=0)
        flat.gradient.addcmul_(suppression, factor.to(flat.gradient.dtype))
