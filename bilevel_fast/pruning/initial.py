"""Random weights in the shape of a pruned UNet, to compare pruned weights with (arXiv:2412.15341, figure 5)."""

import math

import torch
from torch import nn

from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, uniform
from bilevel_fast.pruning.calibration import FIRST


@torch.no_grad()
def reinitialise(student: UNet, seed: int) -> UNet:
    """Give every weight of a UNet the value it would have before any training; returns the same UNet.

    As torch and diffusers initialise one of that shape: linear layers and convolutions uniform within 1 / sqrt(fan-in),
    their biases too, norms 1 and 0. The numbers depend on the seed, the shapes and the place of each tensor in the
    state dict, not on the weights that were there.
    """
    state = student.state_dict()  # views without padding: the fan-in is that of the channels which are there
    for number, (name, old) in enumerate(state.items()):
        owner, _, kind = name.rpartition(".")
        if isinstance(student.get_submodule(owner), nn.GroupNorm | nn.LayerNorm):
            old.fill_(kind == "weight")
            continue
        bound = 1 / math.sqrt(state[f"{owner}.weight"][0].numel())
        drawn = uniform(seed, Stream.INITIAL, [FIRST + number], tuple(old.shape))[0]
        old.copy_(2 * bound * drawn - bound)
    return student
