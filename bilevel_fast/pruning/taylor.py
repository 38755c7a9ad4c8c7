"""Diff-Pruning (arXiv:2305.10924): how much the diffusion loss depends on each unit, over the timesteps that matter.

    importance   I_u = sum over the parameters w of unit u of  |w * sum of dL_t/dw over t with L_t / L_max > threshold|
    loss         L_t = E |target_t - network(x_t, t, c)|^2    of the dense teacher, L_max the largest of them

As in the paper, and in its authors' code, gradients are summed over timesteps first and absolute values are taken per
parameter: dependence of opposite sign at two timesteps cancels, that of two parameters does not.

The threshold is made for networks that predict the noise: their loss falls by orders of magnitude towards the noisiest
timesteps, whose gradients then say little. The loss of a v-prediction does not fall like that: on the mini teacher it
is never below 0.16 of its largest, and the paper's threshold leaves out no timestep.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import Cut, Site, Width, sites
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning.budget import Budget, Calibration, choices
from bilevel_fast.pruning.calibration import CalibrationSet, numbered
from bilevel_fast.pruning.planner import spend

LEVELS = 16
"""Timesteps that are tried, one from each of as many equal parts of the noise process; the paper tries all 1000."""

THRESHOLD = 0.05
"""Of L_t / L_max, the paper's choice."""


def diff_pruning(teacher: UNet, budget: Budget, calibration: Calibration) -> Structure:
    """Keep the units on which the diffusion loss depends most, by Taylor expansion over the timesteps that matter.

    The importance of all vectors is in units of the loss, so it adds up across them: `benchmarks.quality.planner` has
    how much that is worth against shares of each vector.

    Raises:
        UserError: The calibration set is empty, the budget too small, or a loss or gradient is not finite.
    """
    choices(teacher.config, budget)  # refuses what is too little before the time that importances take
    return spend(teacher.config, budget, taylor_importance(teacher, calibration, levels=LEVELS), objective="sum")


def taylor_importance(
    teacher: UNet, calibration: Calibration, *, threshold: float = THRESHOLD, levels: int = LEVELS
) -> dict[str, dict[str, Tensor]]:
    """I_u of every unit: site -> width vector -> (units,) fp64 on the CPU, finite and not negative.

    Two passes over the timesteps: the losses of all decide which gradients are worth computing. Sums over timesteps are
    fp32 whatever the teacher is; its weights, and their `grad`, are left alone.

    Args:
        teacher: Dense.
        calibration: See `CalibrationSet`; all of its batches are tried at every timestep.
        threshold: Of L_t / L_max, in [0, 1).
        levels: Timesteps to try.

    Raises:
        UserError: The calibration set is empty, `threshold` is out of range, or a loss or gradient is not finite.
    """
    if not 0 <= threshold < 1:
        raise UserError(f"threshold is {threshold}, wanted 0 <= threshold < 1")
    trials = CalibrationSet.of(calibration)
    trials = CalibrationSet(trials.loaded("diff-pruning"), trials.schedule, trials.seed)
    timesteps = trials.timesteps(levels).tolist()
    names = [f"{s.name}.{c.tensor}" for s in sites(teacher.config) for w in s.widths for c in w.cuts]
    weights = {name: teacher.get_parameter(name).detach().requires_grad_() for name in names}

    with torch.no_grad():
        losses = [sum(loss.item() for loss in _losses(teacher, {}, trials, i, t)) for i, t in enumerate(timesteps)]
    if not all(map(math.isfinite, losses)):
        raise UserError("teacher: its loss on the calibration set is not finite")
    gradients = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
    for i, t in enumerate(timesteps):
        if losses[i] <= threshold * max(losses):
            continue
        for loss in _losses(teacher, weights, trials, i, t):
            found = torch.autograd.grad(loss, list(weights.values()))
            for total, gradient in zip(gradients.values(), found, strict=True):
                total += gradient

    def unit_sum(site: Site, width: Width, cut: Cut) -> Tensor:
        name = f"{site.name}.{cut.tensor}"
        both = (weights[name].detach().double() * gradients[name].double()).abs().movedim(cut.axis, 0)
        both = both[: cut.copies * width.units * width.unit_size]  # a padded teacher has more
        if not both.isfinite().all():
            raise UserError(f"teacher: the gradient of {name} is not finite on the calibration set")
        return both.reshape(cut.copies, width.units, -1).sum(dim=(0, 2)).cpu()

    return {
        site.name: {w.name: torch.stack([unit_sum(site, w, cut) for cut in w.cuts]).sum(0) for w in site.widths}
        for site in sites(teacher.config)
    }


def _losses(
    teacher: UNet, weights: Mapping[str, Tensor], trials: CalibrationSet, level: int, t: int
) -> Iterator[Tensor]:
    """What each batch adds to L_t at one timestep: the gradient of one is done with before the next is computed."""
    samples = sum(len(latents) for latents, _ in trials.batches)
    for first, latents, text in numbered(trials.batches, level * samples):
        noised = trials.noised(latents, torch.full((len(latents),), t), first)
        out = functional_call(teacher, dict(weights), (noised.x, noised.t, text)).out.float()
        yield (out - noised.target).square().sum() / (samples * latents[0].numel())
