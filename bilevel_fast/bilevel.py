"""Room 6 of a training step: the bilevel loop of arXiv:2412.15341, Algorithm 1, with shared variables.

    K times   theta <- AdamW_lower(theta, grad L_ft(theta))                     distil and fine-tune
    once      theta <- AdamW_upper(theta, grad [L_CU(theta) + lambda L_ft(theta)])    suppress the concept

The levels differ in where batches come from, in the gradient, and in the optimizer: that is a `Level`, and `descend` is
one step of either. There is one set of student parameters. With disjoint copies, as the paper's notation allows, the
lower steps could not reach the upper variable at all.

The penalty lambda L_ft is taken on the last lower batch. Its noise and the teacher's answer are still at hand, so it
costs a forward and backward pass of the student (which has moved) and none of the teacher.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bilevel_fast.data.batches import Batch
from bilevel_fast.diffusion import Noised, Schedule, noise
from bilevel_fast.losses import DEFAULT_WEIGHTS, Loss, LossWeights, fine_tuning_loss, suppression_loss
from bilevel_fast.optim import LevelOptimizer
from bilevel_fast.randomness import Stream, integers, normal
from bilevel_fast.teacher import Teacher
from bilevel_fast.unet import Prediction, UNet

PenaltyNorm = Literal["grad", "raw"]


@dataclass(frozen=True)
class Level:
    """One level of the loop.

    Attributes:
        name: `lower` or `upper`; prefixes its terms in the statistics.
        batches: The batch of the level's own step n, a pure function of n.
        gradient: Computes the loss of a batch and leaves its gradient in the parameters.
        optimizer: Moves the parameters.
    """

    name: Literal["lower", "upper"]
    batches: Callable[[int], Batch]
    gradient: Callable[[Batch], Loss]
    optimizer: LevelOptimizer


def descend(level: Level, step: int) -> dict[str, Tensor]:
    """One step of a level; returns what it measured, scalars on the device."""
    level.optimizer.zero_grad()
    loss = level.gradient(level.batches(step))
    norm = level.optimizer.step()
    terms = {**loss.terms, "loss": loss.total.detach(), "grad_norm": norm}
    return {f"{level.name}/{name}": value for name, value in terms.items()}


def bilevel(lower: Level, upper: Level | None, every: int, start: int, steps: int) -> Iterator[dict[str, Tensor]]:
    """Run lower steps start..steps-1, an upper step after every `every` of them; yields once per lower step.

    Lower step g and upper step g // every follow from g alone, so a run that starts in the middle is the same run.
    """
    for step in range(start, steps):
        terms = descend(lower, step)
        if upper is not None and (step + 1) % every == 0:
            terms |= descend(upper, step // every)
        yield terms


@dataclass(frozen=True)
class Answered:
    """A noised batch and what the teacher said about it."""

    index: Tensor  # (B,) int64, on the CPU
    noised: Noised
    text: Tensor  # (B, L, D)
    teacher: Prediction


class Answers:
    """Rooms 2 and 3: noises a batch and asks the teacher. The last answer is kept.

    The upper level's penalty is taken on it, and several students that walk through the same batches side by side
    share it: the teacher is asked once.

    Args:
        seed: Timestep and noise are pure functions of it and of a sample's global index.
        snr_gamma: See `diffusion.noise`.
    """

    def __init__(self, teacher: Teacher, schedule: Schedule, seed: int, snr_gamma: float | None = 5.0):
        self.teacher, self.schedule, self.seed, self.snr_gamma = teacher, schedule, seed, snr_gamma
        self.last: Answered | None = None

    def __call__(self, batch: Batch) -> Answered:
        if self.last is None or not torch.equal(self.last.index, batch.index):
            noised = self.noise(batch)
            self.last = Answered(batch.index, noised, batch.text, self.teacher.predict(noised, batch.text))
        return self.last

    def noise(self, batch: Batch) -> Noised:
        device, shape = batch.latents.device, tuple(batch.latents.shape[1:])
        eps = normal(self.seed, Stream.NOISE, batch.index, shape).to(device)
        t = integers(self.seed, Stream.TIMESTEP, batch.index, self.schedule.num_train_timesteps).to(device)
        return noise(self.schedule, batch.latents, eps, t, self.snr_gamma)


class FineTuning:
    """The lower gradient: L_ft of the student against data and teacher."""

    def __init__(self, student: UNet, answers: Answers, weights: LossWeights = DEFAULT_WEIGHTS):
        self.student, self.answers, self.weights = student, answers, weights

    def __call__(self, batch: Batch) -> Loss:
        loss = self.loss(self.answers(batch))
        loss.total.backward()
        return loss

    def loss(self, answered: Answered) -> Loss:
        student = self.student(answered.noised.x, answered.noised.t, answered.text)
        return fine_tuning_loss(student, answered.teacher, answered.noised, self.weights)


class Suppression:
    """The upper gradient: the student on the concept's prompt against the teacher steered away from it.

    Args:
        eta: Steering strength, see `Teacher.steer`.
        penalty: lambda.
        penalty_norm: `grad` scales the penalty's gradient to the norm of the suppression gradient before lambda;
            `raw` adds lambda L_ft as the paper writes it.
    """

    def __init__(self, lower: FineTuning, eta: float, penalty: float, penalty_norm: PenaltyNorm):
        self.lower, self.eta, self.penalty = lower, eta, penalty
        self.penalty_norm: PenaltyNorm = penalty_norm

    def __call__(self, batch: Batch) -> Loss:
        assert batch.anchor is not None, "an upper batch needs anchors"
        student, answers = self.lower.student, self.lower.answers
        noised = answers.noise(batch)
        target = answers.teacher.steer(noised, batch.text, batch.anchor, self.eta)
        loss = suppression_loss(student(noised.x, noised.t, batch.text).out, target)
        loss.total.backward()
        if not self.penalty:
            return loss
        assert answers.last is not None, "an upper step follows a lower step"
        penalty = self.lower.loss(answers.last)
        add_penalty(list(student.parameters()), penalty.total, self.penalty, self.penalty_norm)
        total = loss.total.detach() + self.penalty * penalty.total.detach()
        return Loss(total, {**loss.terms, "penalty": penalty.total.detach()})


def add_penalty(parameters: list[nn.Parameter], penalty: Tensor, weight: float, norm: PenaltyNorm) -> None:
    """Add weight * grad(penalty) to the gradients that `parameters` hold.

    With norm "grad", grad(penalty) is first scaled to the norm of the gradients already there: Adam forgets the scale
    of a gradient but not its direction, and lambda = 100 on the raw one leaves nothing of the suppression.
    """
    extra = torch.autograd.grad(penalty, parameters)
    mine = [p.grad for p in parameters if p.grad is not None]
    assert len(mine) == len(extra), "the penalty is added to gradients that are there already"
    scale = torch.full((), weight, device=penalty.device)
    if norm == "grad":
        scale = scale * nn.utils.get_total_norm(mine) / nn.utils.get_total_norm(extra)
    for gradient, addition in zip(mine, extra, strict=True):
        gradient.add_(addition * scale)
