"""Selective Amnesia (arXiv:2305.10120): other images under the concept's prompt, and weights held where they matter.

    L = mean (v_S(x_t, c) - v)^2 + gamma L_replay + lambda sum_i F_i (theta_i - theta*_i)^2

with concept prompt c, images x_0 of a surrogate (here of the bank, which should show the anchor), their true target v,
the student theta* as the run found it, and the diagonal of its Fisher information

    F = mean over samples of (sum over t of grad mean (v_S(x_t, p) - v)^2)^2

on what should be remembered: here the lower level's data, images and prompts p. gamma is 1 and lambda 50 in the
released code (the paper halves lambda). Its replay loss is here the lower loss on the last lower batch, as for the
other erasers: `--upper.penalty 1 --upper.penalty-norm raw` weighs it as the paper does.

A sum over all timesteps of a schedule is taken over a few of them, evenly spread, times what was left out.

The last term asks for no pass of any network: 2 lambda F (theta - theta*) is added to the gradient. So it also serves
other erasers in place of the penalty on the lower loss, which costs a pass of the student: `--upper.solver ewc`.
In a run that starts from a pruned and not yet distilled student, theta* is that student.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import Batch
from bilevel_fast.models.unet import UNet
from bilevel_fast.models.weights import digest_of
from bilevel_fast.training.losses import Loss
from bilevel_fast.training.lower import Answers, descend
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.phases import phase
from bilevel_fast.training.upper import Eraser

_log = logging.getLogger(__name__)


class Remembered:
    """lambda sum F (theta - theta*)^2 of a student, from where it is now.

    Both buffers are made again by whoever resumes a run; a checkpoint keeps the digest of theta*.

    Args:
        flat: The student's parameters, as theta* has them.
        fisher: (m,) fp32, F in the order of `flat`.
        weight: lambda.
    """

    def __init__(self, flat: FlatParameters, fisher: Tensor, weight: float):
        self.fisher, self.weight, self.start = fisher, weight, flat.master.clone()
        self.digest = digest_of(flat.module)

    def __call__(self, flat: FlatParameters) -> Tensor:
        """Add the gradient of the term to `flat.gradient`; returns the term, () fp32. Reads nothing back."""
        moved = flat.master - self.start
        pulled = self.fisher * moved
        flat.gradient.add_(pulled.to(flat.gradient.dtype), alpha=2 * self.weight)
        return self.weight * flat.dot(pulled, moved)

    def state_dict(self) -> dict[str, Any]:
        return {"remembered": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["remembered"] != self.digest:
            raise UserError(
                "the weights are held to the student as the run started, and that is another one now: was --student or "
                "the teacher replaced? Start a new run in another --out"
            )


class SelectiveAmnesia(Eraser):
    """The loss on surrogate images, and the term that holds the weights.

    Args:
        pull: See `Remembered`.
    """

    def __init__(self, pull: Remembered):
        self.pull = self.remembered = pull

    def loss(self, student: UNet, answers: Answers, batch: Batch) -> Loss:
        noised = answers.noise(batch)
        with phase("student"):
            out = student(noised.x, noised.t, batch.text).out
        with phase("losses"):
            total = F.mse_loss(out.float(), noised.target)
        return Loss(total, {"suppression": total.detach()})

    def state_dict(self) -> dict[str, Any]:
        return self.remembered.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.remembered.load_state_dict(state)


def fisher(
    student: UNet,
    answers: Answers,
    flat: FlatParameters,
    batches: Callable[[int], Batch],
    batch: int,
    samples: int,
    timesteps: int,
) -> Tensor:
    """F, (m,) fp32, of the student as it is. Overwrites the gradient.

    One image after the other; where ranks share a batch, the others wait for the one that has it.

    Args:
        batches: This rank's part of batch n.
        batch: Images of a batch, of all ranks together.
        samples: Images over which the mean is taken.
        timesteps: Of each; evenly spread.
    """
    schedule, total = answers.schedule, torch.zeros_like(flat.master)
    last = schedule.num_train_timesteps - 1
    grid = [round(n * last / max(1, timesteps - 1)) for n in range(timesteps)]
    parts: tuple[Batch, ...] = ()

    def loss(one: Batch, t: int) -> Loss:
        one = one.drawn(answers.seed, schedule.num_train_timesteps)
        assert one.t is not None
        noised = answers.noise(replace(one, t=torch.full_like(one.t, t)))
        return Loss(F.mse_loss(student(noised.x, noised.t, one.text).out.float(), noised.target), {})

    def nothing() -> Loss:
        return Loss(0.0 * student.conv_in.weight.sum(), {})

    for number in range(samples):
        if number % batch == 0:
            mine = batches(number // batch)
            parts = mine.split(len(mine.latents) // flat.leaves)
        # the images of the lower level are numbered from 0; one of all leaves has this one
        own = [[one for one in part.split(1) if int(one.index) == number] for part in parts]
        found = torch.zeros_like(flat.master)
        for t in grid:
            losses = (loss(some[0], t) if some else nothing() for some in own)
            descend(losses, flat.leaves, flat, weight=flat.leaves * flat.ranks)
            found += flat.gradient
        total.addcmul_(found, found, value=(schedule.num_train_timesteps / timesteps) ** 2 / samples)
    _log.info("Fisher information of %d images at %d timesteps", samples, timesteps)
    return total
