"""Drop whole layers, as LAPTOP-Diff does (arXiv:2404.11098, sections 3.2 and 3.3).

    output loss   l_i = E |F(x_t, t, c) - F_without_i(x_t, t, c)|^2     of each layer i, dropped alone
    objective     min  sum of l_i over the dropped layers  within the MACs

The sum is the paper's: what several layers cost together is taken for the sum of what each costs alone. It spends a
budget of parameters, we one of MACs. Layers are the sites that leave the shapes as they are: a ResNet that changes the
number of channels stays. Of a Transformer whose blocks are sites each block is a layer, as in the paper's Stable
Diffusion XL, and what is around them goes with the last one.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import Site, UNetConfig, sites, with_emptied
from bilevel_fast.models.layers import Dropped
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.native import plan
from bilevel_fast.pruning.budget import Budget, Calibration
from bilevel_fast.pruning.calibration import CalibrationSet, numbered


def laptop(teacher: UNet, budget: Budget, calibration: Calibration) -> Structure:
    """Drop whole layers: those without which the teacher's output changes least.

    Every unit of the layers that stay is kept; `min_keep` has no say. The budget is met to the layer: none of the
    dropped ones would still fit.

    Raises:
        UserError: The calibration set is empty, the teacher's output is not finite, or the budget is too small even
            with all droppable layers dropped.
    """
    _affordable(teacher.config, budget, [site.name for site in layers(teacher.config)])  # refuses at once
    batches = CalibrationSet.of(calibration)
    losses = output_losses(teacher, CalibrationSet(batches.loaded("laptop"), batches.schedule, batches.seed))
    return cheapest_drops(teacher.config, budget, losses)


def layers(config: UNetConfig) -> list[Site]:
    """The sites that can be dropped one by one."""
    return [site for site in sites(config) if site.droppable and site.widths]


def cheapest_drops(config: UNetConfig, budget: Budget, losses: Mapping[str, float]) -> Structure:
    """Drop some of the sites named in `losses`: within the budget, with the smallest sum of losses there is.

    Raises:
        UserError: The budget is too small even with all of them dropped; the smallest possible one is named.
    """
    costs, spare = _affordable(config, budget, losses)
    options = [np.array([0, cost]) for cost in costs.values()]
    choice = plan(options, [np.array([-loss, 0.0]) for loss in losses.values()], spare).choice
    dropped = {name for name, kept in zip(losses, choice, strict=True) if not kept}
    spare -= sum(cost for name, cost in costs.items() if name not in dropped)
    within, emptied = {site.name: site.within for site in sites(config)}, frozenset[str]()
    for _ in range(2):  # the second time with what the emptied Transformers leave
        for name in losses:  # a layer without any loss is cheaper dropped and no worse; it stays if it fits
            if name in dropped and within[name] not in emptied and costs[name] <= spare:
                dropped.remove(name)
                spare -= costs[name]
        emptied = with_emptied(config, frozenset(dropped)) - dropped
        prices = budget.prices(config)
        spare += sum(prices.sites[name].fixed for name in emptied)
    return Structure.uniform(config, 1.0, with_emptied(config, frozenset(dropped)))


def _affordable(config: UNetConfig, budget: Budget, names: Iterable[str]) -> tuple[dict[str, int], int]:
    """What each of these sites takes, and what the budget leaves for those that stay."""
    prices = budget.prices(config)
    costs = {name: prices.sites[name].dense for name in names}
    spare = int(budget.ratio * prices.dense) - (prices.dense - sum(costs.values()))
    if spare < 0:
        least = 1 - sum(costs.values()) / prices.dense
        raise UserError(
            f"budget {budget.ratio:g} is too small: dropping all {len(costs)} layers that can go leaves "
            f"{math.ceil(1000 * least) / 1000:.3f} of the dense {prices.what}"
        )
    return costs, spare


@torch.no_grad()
def output_losses(teacher: UNet, calibration: CalibrationSet) -> dict[str, float]:
    """Mean squared change of the teacher's output when a site is dropped, for each site that can be.

    Every sample has a timestep and noise of its own, the same for all sites; the timesteps of the whole set are spread
    evenly over the noise process. The teacher is as before afterwards.

    Raises:
        UserError: An output is not finite.
    """
    batches = list(calibration)
    t = calibration.timesteps(sum(len(latents) for latents, _ in batches))
    members = layers(teacher.config)
    totals = dict.fromkeys((site.name for site in members), 0.0)
    elements = 0
    for first, latents, text in numbered(batches):
        noised = calibration.noised(latents, t[first : first + len(latents)], first)
        whole = teacher(noised.x, noised.t, text).out.double()
        elements += whole.numel()
        for site in members:
            with without(teacher, site):
                change = teacher(noised.x, noised.t, text).out.double() - whole
            totals[site.name] += change.square().sum().item()
    losses = {name: total / elements for name, total in totals.items()}
    for name, loss in losses.items():
        if not math.isfinite(loss):
            raise UserError(f"teacher: the output without {name} is not finite on the calibration set")
    return losses


@contextlib.contextmanager
def without(unet: UNet, site: Site) -> Iterator[None]:
    """Drop a site for a while; nothing is copied."""
    parent, _, index = site.name.rpartition(".")
    members = unet.get_submodule(parent)
    own = members[int(index)]  # pyright: ignore[reportIndexIssue]  # a ModuleList
    members[int(index)] = Dropped()  # pyright: ignore[reportIndexIssue]
    try:
        yield
    finally:
        members[int(index)] = own  # pyright: ignore[reportIndexIssue]
