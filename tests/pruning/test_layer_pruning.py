"""Whole layers dropped: LAPTOP-Diff by what the output loses, BK-SDM by hand, each against its paper."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import MINI, SD21, sites
from bilevel_fast.models.macs import count, site_costs
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, normal
from bilevel_fast.pruning import MacBudget, bk_sdm, method
from bilevel_fast.pruning.layers import cheapest_drops, output_losses
from mini_folder import TINY
from tiny_teacher import LATENT, TEXT, TWO, budget, budget_without, make_calibration, make_teacher

# --- LAPTOP ---


def test_output_loss_is_that_of_the_model_without_the_layer():
    """Against models that are cut, and samples noised one by one."""
    teacher, calibration = make_teacher(), make_calibration()
    found = output_losses(teacher, calibration)
    assert list(found) == [site.name for site in sites(TINY) if site.droppable]
    latents, text = (torch.cat(parts) for parts in zip(*calibration, strict=True))
    t = calibration.timesteps(5)
    abar = calibration.schedule.alphas_cumprod[t].reshape(5, 1, 1, 1)
    eps = normal(0, Stream.NOISE, [(1 << 44) + k for k in range(5)], latents.shape[1:])
    x = abar.sqrt() * latents + (1 - abar).sqrt() * eps
    with torch.no_grad():
        whole = teacher(x, t, text).out
        for name, loss in found.items():
            cut = teacher.cut(Structure.uniform(TINY, 1.0, [name]))(x, t, text).out
            assert loss == pytest.approx((cut - whole).square().mean().item(), rel=1e-4)
            assert loss > 0


def test_layers_that_do_nothing_go_first():
    """Two ResNets and a Transformer made exact identities; the budget is what the others cost."""
    teacher = make_teacher()
    idle = {"down_blocks.0.resnets.0": "conv2", "mid_block.resnets.1": "conv2", "up_blocks.1.attentions.0": "proj_out"}
    with torch.no_grad():
        for site, last in idle.items():
            for kind in ("weight", "bias"):
                teacher.get_parameter(f"{site}.{last}.{kind}").zero_()
    losses = output_losses(teacher, make_calibration())
    assert {name for name, loss in losses.items() if loss == 0} == idle.keys()
    assert method("laptop")(teacher, budget_without(*idle), make_calibration()).dropped == idle.keys()
    assert method("laptop")(teacher, budget(1.0), make_calibration()).is_dense, "what fits stays, useful or not"


def test_drops_are_the_best_there_are():
    """Against all 2^16 sets of layers of the mini world's UNet, with losses that prices do not follow."""
    names = [site.name for site in sites(MINI) if site.droppable]
    assert len(names) == 16
    table = site_costs(MINI, 16, 12)
    costs = [table[s.name].total({w.name: w.units for w in s.widths}).true for s in sites(MINI) if s.droppable]
    losses = np.random.default_rng(1).exponential(size=16)
    sets = np.array(list(itertools.product([0, 1], repeat=16)))
    dense = count(Structure.dense(MINI), 16, 12).true
    for share in (0.9, 0.7, 0.5):
        fits = dense - sets @ np.array(costs) <= share * dense
        best = (sets @ losses)[fits].min()
        structure = cheapest_drops(MINI, MacBudget(share, 16, 12), dict(zip(names, losses.tolist(), strict=True)))
        ours = sum(losses[names.index(name)] for name in structure.dropped)
        assert count(structure, 16, 12).ratio <= share
        assert ours == pytest.approx(best, abs=1e-9)


def test_too_small_for_layers():
    """The number in the message is enough; a little less is not."""
    losses = {site.name: 1.0 for site in sites(SD21) if site.droppable}
    with pytest.raises(UserError, match=r"all 34 layers that can go leaves 0\.\d\d\d of the dense MACs") as error:
        cheapest_drops(SD21, budget(0.1, SD21), losses)
    least = float(str(error.value).split(" leaves ")[1].split()[0])
    assert cheapest_drops(SD21, budget(least, SD21), losses).dropped == losses.keys()
    with pytest.raises(UserError, match="is too small"):
        cheapest_drops(SD21, budget(least - 0.001, SD21), losses)


# --- BK-SDM ---

BASE = {
    *(f"down_blocks.{i}.resnets.1" for i in range(4)),
    *(f"down_blocks.{i}.attentions.1" for i in range(3)),
    *(f"up_blocks.{i}.resnets.1" for i in range(4)),
    *(f"up_blocks.{i}.attentions.1" for i in range(1, 4)),
}
MID = {"mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"}


def test_bk_sdm_drops_what_was_published():
    """The second pair of every block; small drops the mid block as well. Parameters: 0.58 and 0.49 billion."""
    base, small = bk_sdm.structure(SD21, "base"), bk_sdm.structure(SD21, "small")
    assert base.dropped == BASE
    assert small.dropped == BASE | MID
    assert round(count(base, 64, 77).params / 1e9, 2) == 0.58
    assert round(count(small, 64, 77).params / 1e9, 2) == 0.49
    for structure, mid in ((base, SD21.mid_block_type), (small, None)):
        own = dataclasses.replace(SD21, layers_per_block=1, mid_block_type=mid)
        theirs, ours = count(Structure.dense(own), 64, 77), count(structure, 64, 77)
        assert (ours.true, ours.params) == (theirs.true, theirs.params)


@pytest.mark.parametrize("size", ["base", "small"])
def test_bk_sdm_is_its_own_unet(size):
    """The structure computes what BK-SDM's smaller UNet computes with the same weights."""
    teacher = make_teacher(config=TWO)
    cut = teacher.cut(bk_sdm.structure(TWO, size))
    mid = TWO.mid_block_type if size == "base" else None
    own = UNet(dataclasses.replace(TWO, layers_per_block=1, mid_block_type=mid))
    # the last pair of an up block is the third here, and the second there
    own.load_state_dict({re.sub(r"(up_blocks\.\d\.\w+)\.2", r"\1.1", k): v for k, v in cut.state_dict().items()})
    x, c = make_calibration()[0]
    t = torch.tensor([5, 500, 990])
    torch.testing.assert_close(cut(x, t, c).out, own(x, t, c).out, rtol=1e-5, atol=1e-6)


def test_bk_sdm_and_budgets():
    teacher = make_teacher(config=TWO)
    structure = bk_sdm.structure(TWO, "base")
    cost = count(structure, LATENT, TEXT).ratio
    assert method("bk-sdm-base")(teacher, budget(cost + 1e-9), ()) == structure
    assert method("bk-sdm-small")(teacher, budget(1.0), ()) == bk_sdm.structure(TWO, "small")
    with pytest.raises(UserError, match=r"budget 0.3 is too small: bk-sdm-base takes 0\.\d{4} of") as error:
        method("bk-sdm-base")(teacher, budget(0.3), ())
    named = float(str(error.value).split(" takes ")[1].split()[0])
    assert cost <= named < cost + 1e-4
    with pytest.raises(UserError, match="bk-sdm-base drops nothing of this UNet: 1 layer per block"):
        method("bk-sdm-base")(make_teacher(), budget(1.0), ())
    with pytest.raises(UserError, match=r"bk-sdm-tiny is a UNet of its own.*bk-sdm-base and bk-sdm-small"):
        method("bk-sdm-tiny")
