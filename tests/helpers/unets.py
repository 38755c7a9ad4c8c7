"""Random UNets, structures and inputs, and how far two results are apart."""

import random

import torch
from torch import Tensor, nn

from bilevel_fast.models.architecture import UNetConfig, sites
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet


def randomise(module: nn.Module, by: float = 0.1) -> None:
    """Away from the initial values: biases of zero and gains of one would hide a swapped tensor."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * by)


def make_unet(config: UNetConfig, dtype: torch.dtype = torch.float32) -> UNet:
    """Dense, random and frozen."""
    unet = UNet(config).to(dtype)
    randomise(unet)
    return unet.requires_grad_(False)


def inputs(config: UNetConfig, batch: int = 2, side: int = 16, dtype: torch.dtype = torch.float32):
    """x, t and text for `UNet.forward`: latents of `side` x `side`, 5 tokens.

    Below 16 the innermost level of four is one token, and softmax over one token has no gradient.
    """
    x = torch.randn(batch, config.in_channels, side, side, dtype=dtype)
    return x, torch.randint(0, 1000, (batch,)), torch.randn(batch, 5, config.cross_attention_dim, dtype=dtype)


def random_structure(config: UNetConfig, seed: int, drop: float) -> Structure:
    """Any units, at least one of each vector; of the sites that can go, the share `drop` is gone."""
    draw = random.Random(seed)
    dropped = frozenset(s.name for s in sites(config) if s.droppable and draw.random() < drop)
    kept = {
        s.name: {w.name: tuple(sorted(draw.sample(range(w.units), draw.randint(1, w.units)))) for w in s.widths}
        for s in sites(config)
        if s.name not in dropped
    }
    return Structure(config, kept, dropped)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
