"""What the tests of the planner share: importances, its objective, and a UNet small enough to try every plan."""

import itertools
import math

import numpy as np
import torch

from bilevel_fast.models.architecture import MINI, SD21, UNetConfig, sites
from bilevel_fast.pruning.budget import MacBudget
from bilevel_fast.pruning.planner import DROP

SIZES = {SD21: (64, 77), MINI: (16, 12)}  # of latents, of text


def macs(config, ratio, **rules):
    return MacBudget(ratio, *SIZES[config], **rules)


def ones(config):
    return {s.name: {w.name: torch.ones(w.units, dtype=torch.float64) for w in s.widths} for s in sites(config)}


def random(config, seed, drops=()):
    """Importances over a factor of some hundred, and the log share that stays when a site of `drops` goes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    found = {s.name: {w.name: draw(w.units).exp() for w in s.widths} for s in sites(config)}
    for name in drops:
        found[name][DROP] = -draw().exp()
    return found


def depth_sites(config):
    return [site.name for site in sites(config) if site.depth_bit]


def timed_row(site, kept, ms, **changes):
    """A row of `benchmarks.speed.unet --sites`: one site with so many units of each vector takes so many ms."""
    settings = {"batch": 1, "latent": 8, "text": 5, "align": 1, "sites": [site], "kept": kept}
    return {"suite": "unet_sites", "value": ms, "device": "d", "config": settings | changes}


def log_share(importance, kept):
    return math.log(importance[list(kept)].sum() / importance.sum())


def objective(structure, importance):
    """What the planner promises to maximise, from the structure alone."""
    total = sum(importance[name][DROP].item() for name in structure.dropped)
    for name, widths in structure.kept.items():
        total += sum(log_share(importance[name][width], kept) for width, kept in widths.items())
    return total


MICRO = UNetConfig(
    8, 4, 4, (16,), ("CrossAttnDownBlock2D",), ("CrossAttnUpBlock2D",), (2,), 8,
    mid_block_type=None, layers_per_block=1, norm_num_groups=4,
)  # fmt: skip
"""Three ResNets of 4 groups and three Transformers of 2 heads, 2 heads and 4 groups."""
MICRO_DROPS = [site.name for site in sites(MICRO) if site.kind == "transformer"]


def best_by_brute_force(importance, cost, limit):
    """All 27 x 13^3 plans: counts of every vector, from a half on, and every set of Transformers dropped.

    Args:
        cost: (site's name, counts by width vector) -> what it takes.
        limit: What all sites together may take.
    """
    sums, worth = np.zeros(1), np.zeros(1)
    for site in sites(MICRO):
        options = [(0, importance[site.name][DROP].item())] if site.name in MICRO_DROPS else []
        for counts in itertools.product(*(range(w.units // 2, w.units + 1) for w in site.widths)):
            kept = {w.name: k for w, k in zip(site.widths, counts, strict=True)}
            ranked = {w: importance[site.name][w].sort(descending=True).values for w in kept}
            shares = sum(math.log(ranked[w][:k].sum() / ranked[w].sum()) for w, k in kept.items())
            options.append((cost(site.name, kept), shares))
        sums = (sums[:, None] + np.array([c for c, _ in options])).ravel()
        worth = (worth[:, None] + np.array([v for _, v in options])).ravel()
    assert len(sums) == 27 * 13**3
    return worth[sums <= limit].max()
