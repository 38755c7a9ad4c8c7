"""Chooses lambda and the pace of upper steps while a run goes on, and ends them when the concept is gone.

It looks at two measurements, both free of scale:

    progress   q = (1 + eta) <v_S - c, y - c> / |y - c|^2, with the student's answer v_S to the concept's prompt, the
               teacher's answer c, and the eraser's target y = a - eta (c - a): 0 at the concept, 1 at the anchor,
               1 + eta at the target. What the student gets wrong in other directions does not count, so q is smooth
               where the suppression loss is not. Numerator and denominator are averaged over upper steps apart. Of
               several concepts each has its own q, and the least one counts.
    gap        smoothed L_ft(theta) over its least value so far, minus 1: the value function gap of arXiv:2412.15341's
               penalty, lambda (L_ft(theta) - min L_ft), with the minimum that this run has seen.

and acts on what both say:

    lambda     times 2^(u - v) after an upper step, where v in [0, 1] says how far q lags behind its schedule, a
               straight line to `gone` at the lower step `by`, and u in [0, 1] how far the gap exceeds its slack
    pace       every `horizon` lower steps: twice as many upper steps if q lags although lambda is at most 1, half as
               many if q is beyond `gone` or only the gap is too large; back to the settings after that
    stop       an upper step that finds q at `gone` or above moves nothing; moving begins anew below 0.95 `gone`. The
               lower level brings a concept back that it never shows: a stop is a pause

The slack is the larger of a share of L_ft and five standard errors of the smoothed value, which are known from the
spread of what was smoothed: with small batches noise alone would look like a gap, and the least of many noisy values
lies some standard errors below their mean.

lambda and stop are tensors that change on the device, where a CUDA graph sees them; a step that is stopped is the
optimizer's skipped step, so no bit moves. The pace is Python's, and costs one read of the device per `horizon`. All of
it is in the checkpoint.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.data.batch import Batch
from bilevel_fast.erasing.registry import reach
from bilevel_fast.erasing.settings import Upper
from bilevel_fast.training.levels import Level, Pace
from bilevel_fast.training.losses import Loss
from bilevel_fast.training.parameters import FlatParameters

LEAST, MOST = 0.1, 100.0
"""Between these lambda stays: below and above, one of the two gradients is as good as alone."""
SLOWEST = 4
"""Upper steps that only look are this much rarer than the settings' at most."""
PAST = 1.2
"""Where the concept is gone unless the settings say: at the anchor itself some samples still show it."""
BACK = 0.95
"""Share of `gone` below which a stopped level moves again."""
STEEP = 4.0
"""v is 1 where q lags by a quarter of the way."""
NOISE = 5.0
"""Standard errors of the smoothed L_ft that are no gap yet."""
KEPT = 0.5
"""What the averages of progress keep of themselves from one upper step to the next."""


class Controller(Pace):
    """Sees the losses of both levels of one run.

    Args:
        upper: lambda and K to begin with, and the settings; a lambda of 0 begins at `LEAST`.
        steps: Lower steps of the whole run.
        device: Of the student.
        concepts: How many there are.
        shows: Which of them upper sample n of the run shows.
        flat: The student's parameters, if other processes share them.
        leaves: Equal parts of an upper batch, and which of them this process sees.

    Attributes:
        penalty: () fp32, lambda of the next upper step.
        stopped: () fp32, 1 where an upper step moves nothing.
        every: Lower steps per upper step, at present.
        upper_steps: Upper steps so far, with those that moved nothing.
    """

    def __init__(
        self,
        upper: Upper,
        steps: int,
        device: torch.device,
        concepts: int = 1,
        shows: Callable[[int], int] = lambda sample: 0,
        flat: FlatParameters | None = None,
        leaves: tuple[int, range] = (1, range(1)),
    ):
        self.settings, self.first, self.every = upper.controller, upper.every, upper.every
        # where the target is at the anchor, nobody gets there
        self.gone = upper.controller.gone or min(PAST, 0.9 * reach(upper))
        self.deadline, self.upper_steps, self.last = upper.controller.by * steps, 0, 0
        # L_ft: sum of weights, of their squares, weighted sums of values and of squared errors; least value; steps
        self.lower = torch.zeros(6, device=device)
        # progress of each concept: weighted sums of numerator and denominator
        self.way = torch.zeros(concepts, 2, device=device)
        self.shows, self.batch, self.flat = shows, upper.batch, flat
        size = upper.batch // leaves[0]
        self.rows = range(leaves[1].start * size, leaves[1].stop * size)
        # which concept each row that is seen of the next upper batch shows
        self.concepts = torch.zeros(len(self.rows), dtype=torch.int64, device=device)
        # progress of the leaves so far of this step, (concepts, 2) each
        self.parts, self.seen = len(leaves[1]), list[Tensor]()
        self.penalty = torch.tensor(min(max(upper.penalty, LEAST), MOST), device=device)
        self.stopped = torch.zeros((), device=device)

    def take(self, lower: Level, upper: Level) -> tuple[Level, Level]:
        """Both levels, seen and steered. The upper level's gradient already weighs by `penalty`."""
        assert upper.eraser is not None
        upper.eraser.watch, upper.optimizer.held = self.watch, self.stopped

        def seen(batch: Batch) -> Loss:
            loss = lower.gradient(batch)
            self.see(loss.total.detach())
            return loss

        def steered(batch: Batch) -> Loss:
            loss = upper.gradient(batch)
            return Loss(loss.total, loss.terms | self.decide())

        return replace(lower, gradient=seen), replace(upper, gradient=steered, pace=self)

    def see(self, loss: Tensor) -> None:
        """Take in L_ft of a lower step, () fp32. One that is not finite changes nothing: neither does its step."""
        kept = 1 - 1 / self.settings.horizon
        weight, squares, total, errors, least, steps = self.lower.unbind()
        off = torch.where(weight > 0, loss - total / weight.clamp(min=1e-9), 0.0)
        weight, squares = kept * weight + (1 - kept), kept**2 * squares + (1 - kept) ** 2
        total, errors = kept * total + (1 - kept) * loss, kept * errors + (1 - kept) * off.square()
        smooth = total / weight
        # the first horizon's average is noise and descent: its least value would stand for ever
        least = torch.where(steps < self.settings.horizon, smooth, torch.minimum(least, smooth))
        new = torch.stack([weight, squares, total, errors, least, steps + 1])
        self.lower.copy_(torch.where(loss.isfinite(), new, self.lower))

    def watch(self, out: Tensor, concept: Tensor, target: Tensor, reach: float, order: Tensor | None = None) -> None:
        """Take in an upper step's progress, of one leaf of its batch after the other.

        Args:
            out: (B, C, H, W) the student's answer to the concept.
            concept: The teacher's, of the same shape.
            target: What the eraser wants instead.
            reach: Where the target lies, in distances from concept to anchor: 1 + eta.
            order: (B,) which row of the leaf each of these is; None where they are in its order.
        """
        gone, way = (x.detach().float() - concept.float() for x in (out, target))
        rows = torch.stack([reach * (gone * way).flatten(1).sum(1), way.square().flatten(1).sum(1)], dim=1)
        concepts = self.concepts[len(self.seen) * len(out) :][: len(out)]
        concepts = concepts if order is None else concepts[order]
        self.seen.append(torch.zeros_like(self.way).index_add_(0, concepts, rows))
        if len(self.seen) < self.parts:
            return
        if self.flat is None:
            (found,) = self.seen
        else:
            found = self.flat.everywhere(torch.stack(self.seen)).sum(0)
        self.seen.clear()
        new = KEPT * self.way + (1 - KEPT) * found
        self.way.copy_(torch.where(new.isfinite().all(), new, self.way))

    @property
    def progress(self) -> Tensor:
        """() fp32, of the concept that has come least far; 0 before the first upper step."""
        return (self.way[:, 0] / self.way[:, 1].clamp(min=1e-12)).min()

    @property
    def excess(self) -> tuple[Tensor, Tensor]:
        """The gap, as a share of the least L_ft, and u; both () fp32."""
        weight, squares, total, errors, least, _ = self.lower.unbind()
        gap = total / weight.clamp(min=1e-9) - least
        noise = (errors * squares).sqrt() / weight.clamp(min=1e-9) ** 1.5
        slack = torch.maximum(self.settings.gap * least, NOISE * noise).clamp(min=1e-12)
        return gap / least.clamp(min=1e-12), (gap / slack - 1).clamp(0, 1)

    @property
    def lag(self) -> Tensor:
        """v, () fp32."""
        due = self.gone * (self.lower[5] / self.deadline).clamp(max=1)
        return (STEEP * (due - self.progress) / self.gone).clamp(0, 1)

    def decide(self) -> dict[str, Tensor]:
        """Set lambda for the next upper step and stop for this one; what was found, () fp32 each."""
        (gap, u), v, progress, used = self.excess, self.lag, self.progress, self.penalty.clone()
        moves = torch.where(progress < BACK * self.gone, 0.0, self.stopped)
        self.stopped.copy_(torch.where(progress >= self.gone, 1.0, moves))
        turned = (used * torch.exp2(u - v)).clamp(LEAST, MOST)
        self.penalty.copy_(torch.where(self.stopped > 0, used, turned))
        return {"lambda": used, "gap": gap, "progress": progress, "stopped": self.stopped.clone()}

    def due(self, step: int) -> int | None:
        if (step + 1) % self.settings.horizon == 0 and self.upper_steps:
            self._review()
        if step + 1 - self.last < self.every:
            return None
        self.last, number = step + 1, self.upper_steps
        self.upper_steps += 1
        if len(self.way) > 1:  # before the step, which may be a CUDA graph: its rows lie where they always do
            samples = [number * self.batch + row for row in self.rows]
            self.concepts.copy_(torch.tensor([self.shows(sample) for sample in samples]), non_blocking=True)
        return number

    def _review(self) -> None:
        progress, u, v, penalty = torch.stack([self.progress, self.excess[1], self.lag, self.penalty]).tolist()
        if progress >= self.gone or (u > 0.5 and v < 0.5):
            self.every = min(2 * self.every, SLOWEST * self.first)
        elif v >= 0.5 and penalty <= 1:
            self.every = max(self.every // 2, 1)
        elif self.every > self.first:
            self.every = self.first

    def state_dict(self) -> dict[str, Any]:
        numbers = {"lower": self.lower, "way": self.way, "penalty": self.penalty, "stopped": self.stopped}
        return numbers | {"every": self.every, "upper_steps": self.upper_steps, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("lower", "way", "penalty", "stopped"):
            getattr(self, name).copy_(state[name])  # in place: a CUDA graph looks where it lies
        self.every, self.upper_steps, self.last = (int(state[name]) for name in ("every", "upper_steps", "last"))
