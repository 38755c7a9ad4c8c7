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
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bilevel_fast.data.batches import Batch
from bilevel_fast.diffusion import Noised, Schedule, noise
from bilevel_fast.losses import DEFAULT_WEIGHTS, Loss, LossWeights, fine_tuning_loss, suppression_loss
from bilevel_fast.optim import LevelOptimizer
from bilevel_fast.parameters import FlatParameters
from bilevel_fast.rooms import room
from bilevel_fast.stats import Means
from bilevel_fast.teacher import Teacher
from bilevel_fast.unet import Prediction, UNet

PenaltyNorm = Literal["grad", "raw"]


Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Level:
    """One level of the loop.

    Attributes:
        name: `lower` or `upper`; prefixes its terms in the statistics.
        batches: The batch of the level's own step n, a pure function of n.
        gradient: Computes the loss of a batch and adds its gradient to that of the parameters.
        optimizer: Moves the parameters.
        means: Adds up what its steps measured, on the device.
    """

    name: Literal["lower", "upper"]
    batches: Callable[[int], Batch]
    gradient: Callable[[Batch], Loss]
    optimizer: LevelOptimizer
    means: Means = field(default_factory=Means)


def move(level: Level, batch: Batch) -> Terms:
    """One step of a level on a batch; returns what it measured, scalars on the device.

    Nothing here waits for the device, and nothing but tensors changes from step to step: a CUDA graph can hold it.
    """
    with room("optimizer"):
        level.optimizer.zero_grad()
    loss = level.gradient(batch)
    with room("optimizer"):
        norm = level.optimizer.step()
        terms = {**loss.terms, "loss": loss.total.detach(), "grad_norm": norm}
        terms = {f"{level.name}/{name}": value for name, value in terms.items()}
        level.means.add(terms)
    return terms


def descend(level: Level, step: int, move: Callable[[Level, Batch], Terms] = move) -> Terms:
    """Step number `step` of a level, through `move` or what stands for it (`graphs.Graphs`)."""
    with room("data"):
        batch = level.batches(step)
    return move(level, batch)


def bilevel(
    lower: Level,
    upper: Level | None,
    every: int,
    start: int,
    steps: int,
    move: Callable[[Level, Batch], Terms] = move,
) -> Iterator[Terms]:
    """Run lower steps start..steps-1, an upper step after every `every` of them; yields once per lower step.

    Lower step g and upper step g // every follow from g alone, so a run that starts in the middle is the same run.
    """
    for step in range(start, steps):
        terms = descend(lower, step, move)
        if upper is not None and (step + 1) % every == 0:
            terms = terms | descend(upper, step // every, move)
        yield terms


@dataclass(frozen=True)
class Answered:
    """A noised batch and what the teacher said about it."""

    noised: Noised
    text: Tensor  # (B, L, D)
    teacher: Prediction


class Answers:
    """Rooms 2 and 3: noises a batch and asks the teacher. The last answer is kept for the upper level's penalty.

    Args:
        seed: Timestep and noise are pure functions of it and of a sample's global index.
        snr_gamma: See `diffusion.noise`.
    """

    def __init__(self, teacher: Teacher, schedule: Schedule, seed: int, snr_gamma: float | None = 5.0):
        self.teacher, self.schedule, self.seed, self.snr_gamma = teacher, schedule, seed, snr_gamma
        self.last: Answered | None = None

    def __call__(self, batch: Batch) -> Answered:
        noised = self.noise(batch)
        self.last = Answered(noised, batch.text, self.teacher.predict(noised, batch.text))
        return self.last

    def noise(self, batch: Batch) -> Noised:
        with room("diffusion"):
            batch = batch.drawn(self.seed, self.schedule.num_train_timesteps)
            assert batch.eps is not None
            assert batch.t is not None
            return noise(self.schedule, batch.latents, batch.eps, batch.t, self.snr_gamma)


class SharedAnswers(Answers):
    """For students that walk through the same batches side by side: the teacher is asked once per batch."""

    _index: Tensor | None = None

    def __call__(self, batch: Batch) -> Answered:
        if self.last is None or self._index is None or not torch.equal(self._index, batch.index):
            self._index = batch.index
            return super().__call__(batch)
        return self.last


class FineTuning:
    """The lower gradient: L_ft of the student against data and teacher."""

    def __init__(self, student: UNet, answers: Answers, weights: LossWeights = DEFAULT_WEIGHTS):
        self.student, self.answers, self.weights = student, answers, weights

    def __call__(self, batch: Batch) -> Loss:
        loss = self.loss(self.answers(batch))
        _backward(loss.total)
        return loss

    def loss(self, answered: Answered) -> Loss:
        with room("student"):
            student = self.student(answered.noised.x, answered.noised.t, answered.text)
        with room("losses"):
            return fine_tuning_loss(student, answered.teacher, answered.noised, self.weights)


class Suppression:
    """The upper gradient: the student on the concept's prompt against the teacher steered away from it.

    Args:
        lower: Its student, teacher and last batch are the upper level's as well.
        eta: Steering strength, see `Teacher.steer`.
        penalty: lambda.
        penalty_norm: `grad` scales the penalty's gradient to the norm of the suppression gradient before lambda;
            `raw` adds lambda L_ft as the paper writes it.
        flat: The student's parameters: where its gradient is.
    """

    def __init__(self, lower: FineTuning, eta: float, penalty: float, penalty_norm: PenaltyNorm, flat: FlatParameters):
        self.lower, self.flat, self.eta, self.penalty = lower, flat, eta, penalty
        self.penalty_norm: PenaltyNorm = penalty_norm

    def __call__(self, batch: Batch) -> Loss:
        assert batch.anchor is not None, "an upper batch needs anchors"
        student, answers = self.lower.student, self.lower.answers
        noised = answers.noise(batch)
        target = answers.teacher.steer(noised, batch.text, batch.anchor, self.eta)
        with room("student"):
            out = student(noised.x, noised.t, batch.text).out
        with room("losses"):
            loss = suppression_loss(out, target)
        _backward(loss.total)
        if not self.penalty:
            return loss
        assert answers.last is not None, "an upper step follows a lower step"
        penalty = self.lower.loss(answers.last)
        if self.penalty_norm == "raw":
            _backward(self.penalty * penalty.total)
        else:
            self._add_scaled(penalty.total)
        total = loss.total.detach() + self.penalty * penalty.total.detach()
        return Loss(total, {**loss.terms, "penalty": penalty.total.detach()})

    def _add_scaled(self, penalty: Tensor) -> None:
        """Add lambda times the penalty's gradient, scaled to the norm of the gradient that is there already.

        Adam forgets the scale of a gradient but not its direction: lambda = 100 on the raw one leaves nothing of the
        suppression.
        """
        flat = self.flat
        with room("losses"):
            suppression, norm = flat.gradient.clone(), flat.norm()
            flat.zero_grad()
        _backward(penalty)
        with room("losses"):
            scale = (self.penalty * norm / flat.norm()).to(flat.dtype)
            torch.addcmul(suppression, flat.gradient, scale, out=flat.gradient)


def _backward(loss: Tensor) -> None:
    with room("backward"):
        loss.backward()
