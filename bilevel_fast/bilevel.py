"""Room 6 of a training step: the bilevel loop of arXiv:2412.15341, Algorithm 1, with shared variables.

    K times   theta <- AdamW_lower(theta, grad L_ft(theta))                     distil and fine-tune
    once      theta <- AdamW_upper(theta, grad [L_CU(theta) + lambda L_ft(theta)])    suppress the concept

The levels differ in where batches come from, in the gradient, and in the optimizer: that is a `Level`, and `descend` is
one step of either. There is one set of student parameters. With disjoint copies, as the paper's notation allows, the
lower steps could not reach the upper variable at all.

L_CU is an `Eraser`'s: `bilevel_fast.erasing` has them by name. What is done with its gradient is `Suppression`'s. Where
the eraser is an `Edit`, there is no L_CU: an upper step then changes the weights outright, and that is `Editing`.

The penalty lambda L_ft is taken on the last lower batch. Its noise and the teacher's answer are still at hand, so it
costs a forward and backward pass of the student (which has moved) and none of the teacher.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel_fast.data.batches import Batch
from bilevel_fast.diffusion import Noised, Schedule, noise
from bilevel_fast.losses import DEFAULT_WEIGHTS, Loss, LossWeights, fine_tuning_loss
from bilevel_fast.optim import LevelOptimizer
from bilevel_fast.parameters import FlatParameters, dot, norm
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
        eraser: Of the upper level: says whether its step can be recorded, and what a checkpoint must keep of it.
        pace: Of the upper level: when its steps come, where that is not every so many lower steps.
    """

    name: Literal["lower", "upper"]
    batches: Callable[[int], Batch]
    gradient: Callable[[Batch], Loss]
    optimizer: LevelOptimizer
    means: Means = field(default_factory=Means)
    eraser: "Eraser | None" = None
    pace: "Pace | None" = None

    def step(self, batch: Batch) -> Terms:
        with room("optimizer"):
            self.optimizer.zero_grad()
        loss = self.gradient(batch)
        with room("optimizer"):
            norm = self.optimizer.step()
        return {**loss.terms, "loss": loss.total.detach(), "grad_norm": norm}


@dataclass(frozen=True)
class Editing:
    """The upper level where the eraser is an edit of weights: no images, no loss, no optimizer.

    Attributes:
        eraser: The edit.
        means: Adds up what its steps measured, on the device.
    """

    eraser: "Edit"
    means: Means = field(default_factory=Means)
    name: Literal["upper"] = "upper"

    def batches(self, step: int) -> Batch:
        """No images; and here, before the step that may be recorded, the edit does what cannot be."""
        self.eraser.prepare(step)
        return _NO_BATCH

    def step(self, batch: Batch) -> Terms:
        with room("optimizer"):
            return self.eraser.apply()


_NO_BATCH = Batch(torch.empty(0), torch.empty(0), None, torch.empty(0, dtype=torch.int64))

AnyLevel = Level | Editing


def move(level: AnyLevel, batch: Batch) -> Terms:
    """One step of a level on a batch; returns what it measured, scalars on the device.

    Nothing here waits for the device, and nothing but tensors changes from step to step: a CUDA graph can hold it.
    """
    terms = level.step(batch)
    with room("optimizer"):
        terms = {f"{level.name}/{name}": value for name, value in terms.items()}
        level.means.add(terms)
    return terms


def descend(level: AnyLevel, step: int, move: Callable[[AnyLevel, Batch], Terms] = move) -> Terms:
    """Step number `step` of a level, through `move` or what stands for it (`graphs.Graphs`)."""
    with room("data"):
        batch = level.batches(step)
    return move(level, batch)


def bilevel(
    lower: Level,
    upper: AnyLevel | None,
    every: int,
    start: int,
    steps: int,
    move: Callable[[AnyLevel, Batch], Terms] = move,
) -> Iterator[Terms]:
    """Run lower steps start..steps-1, an upper step after every `every` of them; yields once per lower step.

    Lower step g and upper step g // every follow from g alone, so a run that starts in the middle is the same run. An
    upper level with a pace of its own says itself when it is due; what that follows from is in the pace's state.
    """
    for step in range(start, steps):
        terms = descend(lower, step, move)
        if upper is not None:
            regular = step // every if (step + 1) % every == 0 else None
            pace = upper.pace if isinstance(upper, Level) else None
            number = pace.due(step) if pace else regular
            if number is not None:
                terms = terms | descend(upper, number, move)
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


class Plugin:
    """What `--upper.eraser` names.

    Attributes:
        eager: Why a step of it cannot be recorded as a CUDA graph; empty where it can. A step that can reads nothing
            back from the device, and does the same on every batch.
    """

    eager: str = ""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that a resumed run cannot make again; empty without such."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            UserError: The run would go on as another one.
        """
        assert not state


class Eraser(Plugin, ABC):
    """What the upper level descends on a batch of the concept.

    Attributes:
        rule: How its gradient and that of the lower loss become one: see `Suppression`; None leaves it to the settings.
        watch: Wants to see how far the student has come, in every step; None where nobody does.
    """

    rule: "Rule | None" = None
    watch: "Watch | None" = None

    @abstractmethod
    def loss(self, student: UNet, answers: "Answers", batch: Batch) -> Loss:
        """The loss of a concept batch, with gradient to the student and to nothing else.

        Args:
            student: As it is now.
            answers: The teacher, the schedule and the seed, and how a batch is noised.
            batch: Concept images with their captions' states, and those of their anchors.
        """

    def hold(self) -> None:  # most hold nothing
        """Zero the gradient of what the upper level must not move; called after every backward pass."""


class Edit(Plugin, ABC):
    """A change of the student's weights that the upper level makes again and again, between lower steps."""

    def prepare(self, step: int) -> None:  # most are prepared when they are made
        """Called before upper step `step`, and never recorded."""

    @abstractmethod
    def apply(self) -> Terms:
        """Change the masters, what computes, and the average where there is one; return what it measured."""


Watch = Callable[..., None]
"""watch(out, concept, target, reach[, order]): see `erasing.controller.Controller.watch`."""


class Pace(ABC):
    """When upper steps come, decided while the run goes on.

    Attributes:
        every: Lower steps per upper step, at present.
        upper_steps: Upper steps so far.
    """

    every: int
    upper_steps: int

    @abstractmethod
    def due(self, step: int) -> int | None:
        """The number of the upper step that follows lower step `step`, from 0 without a gap; None if there is none.

        Called once after every lower step, in their order. May read the device.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that what is to come follows from."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Rule = Callable[[Tensor, FlatParameters], None]
"""rule(g, flat): g (N,) is the suppression gradient, `flat.gradient` the lower loss's, and then what is descended."""


class Suppression:
    """The upper gradient: an eraser's loss on the concept batch, and the lower loss on the last lower batch.

    Args:
        lower: Its student, teacher and last batch are the upper level's as well.
        eraser: Gives the loss of the concept batch.
        penalty: lambda; an eraser with a rule of its own does not read it. A tensor () where it changes from step to
            step: only for `grad`.
        penalty_norm: `grad` scales the penalty's gradient to the norm of the suppression gradient before lambda;
            `raw` adds lambda L_ft as the paper writes it.
        flat: The student's parameters: where its gradient is.
        hold: Zeroes the gradient of parameters that the upper level leaves alone, if there are such. A gradient that
            was zero in all upper steps leaves AdamW's upper moments zero, and there is no weight decay: an upper step
            changes no bit of such a parameter.
        surgery: Whether the suppression gradient first loses what runs against the lower loss's gradient.
    """

    def __init__(
        self,
        lower: FineTuning,
        eraser: Eraser,
        penalty: float | Tensor,
        penalty_norm: PenaltyNorm,
        flat: FlatParameters,
        hold: Callable[[], object] = lambda: None,
        surgery: bool = False,
    ):
        self.lower, self.eraser, self.flat, self.penalty = lower, eraser, flat, penalty
        self.penalty_norm: PenaltyNorm = penalty_norm
        self.surgery, self._hold = surgery, hold

    def __call__(self, batch: Batch) -> Loss:
        answers = self.lower.answers
        loss = self.eraser.loss(self.lower.student, answers, batch)
        self._descend(loss.total)
        if not (isinstance(self.penalty, Tensor) or self.penalty or self.surgery or self.eraser.rule):
            return loss
        assert answers.last is not None, "an upper step follows a lower step"
        penalty = self.lower.loss(answers.last)
        if self.penalty_norm == "raw" and not self.surgery and not self.eraser.rule:
            self._descend(self.penalty * penalty.total)
        else:
            with room("losses"):
                suppression = self.flat.gradient.clone()
                self.flat.zero_grad()
            self._descend(penalty.total)
            with room("losses"):
                (self.eraser.rule or self._add)(suppression, self.flat)
        # a rule's weights change from step to step: what is shown is the plain sum
        weight = 1.0 if self.eraser.rule else self.penalty
        total = loss.total.detach() + weight * penalty.total.detach()
        return Loss(total, {**loss.terms, "penalty": penalty.total.detach()})

    def _descend(self, loss: Tensor) -> None:
        _backward(loss)
        self._hold()
        self.eraser.hold()

    def _add(self, suppression: Tensor, flat: FlatParameters) -> None:
        """Add lambda times the penalty's gradient, scaled to the norm of the suppression gradient if so asked.

        Adam forgets the scale of a gradient but not its direction: lambda = 100 on the raw one leaves nothing of the
        suppression.
        """
        if self.surgery:
            project(suppression, flat.gradient)
        if self.penalty_norm == "grad":
            scale = (self.penalty * norm(suppression) / norm(flat.gradient)).to(flat.dtype)
            torch.addcmul(suppression, flat.gradient, scale, out=flat.gradient)
        else:
            assert not isinstance(self.penalty, Tensor), "lambda moves under `grad` only"
            torch.add(suppression, flat.gradient, alpha=self.penalty, out=flat.gradient)


def project(gradient: Tensor, other: Tensor) -> None:
    """Take out of `gradient`, in place, what runs against `other`, both (N,): PCGrad (arXiv:2001.06782, algorithm 1).

        g <- g - min(0, <g, r>) / |r|^2 r

    Only the suppression gradient is projected, not the lower loss's as well: it is suppression that must not undo the
    lower level. Nothing is read back from the device.
    """
    against = dot(gradient, other).clamp(max=0) / dot(other, other).clamp(min=torch.finfo(torch.float32).tiny)
    gradient.addcmul_(other, -against.to(gradient.dtype))


def _backward(loss: Tensor) -> None:
    with room("backward"):
        loss.backward()
