"""Both levels of a training, and their steps in turn: arXiv:2412.15341, Algorithm 1, with shared variables.

    K times   theta <- AdamW_lower(theta, grad L_ft(theta))                     distil and fine-tune
    once      theta <- AdamW_upper(theta, grad [L_CU(theta) + lambda L_ft(theta)])    suppress the concept

The levels differ in where batches come from, in the gradient, and in the optimizer: that is a `Level`, and `descend` is
one step of either. There is one set of student parameters. With disjoint copies, as the paper's notation allows, the
lower steps could not reach the upper variable at all.

The lower gradient is `lower.FineTuning`'s, the upper one `upper.Suppression`'s of some `Eraser`. Where what
suppresses is an `Edit`, there is no L_CU: an upper step then changes the weights outright, and that is `Editing`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from bilevel_fast.data.batch import Batch
from bilevel_fast.training.losses import Loss
from bilevel_fast.training.optim import LevelOptimizer
from bilevel_fast.training.phases import phase
from bilevel_fast.training.stats import Means
from bilevel_fast.training.upper import Edit, Eraser, Terms


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


@dataclass(frozen=True)
class Level:
    """One level of the loop.

    Attributes:
        name: `lower` or `upper`; prefixes its terms in the statistics.
        batches: The batch of the level's own step n, a pure function of n.
        gradient: Computes the loss of a batch, and its gradient, which replaces the one that `optimizer.flat` holds.
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
    eraser: Eraser | None = None
    pace: Pace | None = None

    def step(self, batch: Batch) -> Terms:
        self.optimizer.flat.publish()  # on its way while the teacher answers
        loss = self.gradient(batch)
        with phase("optimizer"):
            norm = self.optimizer.step()
        return {**loss.terms, "loss": loss.total.detach(), "grad_norm": norm}


@dataclass(frozen=True)
class Editing:
    """The upper level where the eraser is an edit of weights: no images, no loss, no optimizer.

    Attributes:
        eraser: The edit.
        means: Adds up what its steps measured, on the device.
    """

    eraser: Edit
    means: Means = field(default_factory=Means)
    name: Literal["upper"] = "upper"

    def batches(self, step: int) -> Batch:
        """No images; and here, before the step that may be recorded, the edit does what cannot be."""
        self.eraser.prepare(step)
        return _NO_BATCH

    def step(self, batch: Batch) -> Terms:
        with phase("optimizer"):
            return self.eraser.apply()


_NO_BATCH = Batch(torch.empty(0), torch.empty(0), None, torch.empty(0, dtype=torch.int64))

AnyLevel = Level | Editing


def move(level: AnyLevel, batch: Batch) -> Terms:
    """One step of a level on a batch; returns what it measured, scalars on the device.

    Nothing here waits for the device, and nothing but tensors changes from step to step: a CUDA graph can hold it.
    """
    terms = level.step(batch)
    with phase("optimizer"):
        terms = {f"{level.name}/{name}": value for name, value in terms.items()}
        level.means.add(terms)
    return terms


def descend(level: AnyLevel, step: int, move: Callable[[AnyLevel, Batch], Terms] = move) -> Terms:
    """Step number `step` of a level, through `move` or what stands for it (`graphs.Graphs`)."""
    with phase("data"):
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
