"""Weights that lie on all ranks in parts train as they do whole; ranks are threads here."""

import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F

from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.training.fully_sharded import FullyShardedParameters
from bilevel_fast.training.losses import Loss
from bilevel_fast.training.lower import descend
from bilevel_fast.training.optim import AdamW, LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.units import members
from thread_team import together
from world import TINY

ONE_AT_A_TIME = threading.Lock()
SMALL = dataclasses.replace(TINY, block_out_channels=(32, 64))
LEAVES = 2


def unet() -> UNet:
    """With padding inside of its parameters, which a state dict leaves out."""
    with ONE_AT_A_TIME:  # threads share torch's random numbers
        torch.manual_seed(0)
        return UNet(SMALL, Structure.uniform(SMALL, 0.6), 8)


def inputs(part: int):
    generator = torch.Generator().manual_seed(part)
    x = torch.randn(1, SMALL.in_channels, 8, 8, generator=generator)
    return x, torch.tensor([100 + part]), torch.randn(1, 5, SMALL.cross_attention_dim, generator=generator)


def losses(network: UNet, parts):
    for part in parts:
        x, t, text = inputs(part)
        out = network(x, t, text)
        yield Loss(F.mse_loss(out.out.float(), x) + sum(b.float().square().mean() for b in out.blocks), {})


def train(flat, mine, steps=3):
    """Steps of AdamW; `mine` are the parts of a batch that are computed here."""
    optimizer = LevelOptimizer(flat, 1e-3, 0, clip_norm=1.0, make=lambda flat: AdamW(flat, decay=0.9))
    norms = []
    for _ in range(steps):
        descend(losses(flat.module, mine), len(mine), flat)
        norms.append(optimizer.step())
    return optimizer, torch.stack(norms)


def vector(state) -> torch.Tensor:
    return torch.cat([value.double().flatten() for _, value in sorted(state.items())])


def assert_off_by_rounding(state, wanted, by=1e-6) -> None:
    assert state.keys() == wanted.keys()
    assert (vector(state) - vector(wanted)).norm() <= by * vector(wanted).norm()


def test_every_parameter_is_in_one_unit_and_blocks_are_apart():
    network = unet()
    found = members(network)
    assert sorted(name for _, names in found for name in names) == sorted(n for n, _ in network.named_parameters())
    assert found[0][0] is network
    largest = max(sum(network.get_parameter(n).numel() for n in names) for _, names in found)
    assert largest < sum(p.numel() for p in network.parameters()) / 4


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world", "leaves", "micro"), [(2, 2, 1), (1, 2, 1), (2, 4, 2)])
def test_steps_are_those_of_flat_parameters(world, leaves, micro, dtype, recompute):
    """Norms, masters, average and moments; and what was saved goes on, whole or in parts."""
    parts = range(leaves * micro)
    one = FlatParameters(unet(), dtype, average=True, summed=True)
    one.module.recompute = recompute
    optimizer, norms = train(one, parts)
    wanted = [
        {n: v.clone() for n, v in one.state_dict(b).items()} for b in (one.master, one.average, optimizer.rule.second)
    ]

    def work(team):
        flat = FullyShardedParameters(unet(), dtype, average=True, team=team, leaves=leaves)
        flat.module.recompute = recompute
        mine = [leaf * micro + part for leaf in team.ranks.leaves(leaves) for part in range(micro)]
        optimizer, norms = train(flat, mine)
        assert not any(p.untyped_storage().nbytes() for p in flat.module.parameters()), "nothing is left open"
        states = [flat.state_dict(buffer) for buffer in (flat.master, flat.average, optimizer.rule.second)]
        return team, flat, norms, states

    close = 1e-6 if dtype == torch.float32 else 1e-3
    for team, flat, its_norms, states in together(world, work):
        assert (its_norms - norms).norm() <= close * norms.norm()
        if team.rank:
            assert states == [{}, {}, {}]
            continue
        for state, expected, by in zip(states, wanted, (close, close, 10 * close), strict=True):
            assert_off_by_rounding(state, expected, by)
        assert flat._units.peak < flat.size / 2, "never more than a part of the network was whole"
