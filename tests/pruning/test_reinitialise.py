"""Random weights in the shape of a student."""

import math

import pytest
import torch

from bilevel_fast.models.architecture import MINI
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, normal
from bilevel_fast.pruning import reinitialise
from mini_folder import TINY
from tiny_teacher import make_teacher


def test_reinitialised_weights_depend_on_the_seed_alone():
    structure = Structure.uniform(TINY, 0.5, ["mid_block.attentions.0"])
    first, other = (make_teacher(seed).cut(structure) for seed in (0, 1))
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    assert reinitialise(first, 7) is first
    assert first.structure == structure
    reinitialise(other, 7)
    padded = reinitialise(make_teacher().cut(structure, align=16), 7)
    eighth = reinitialise(make_teacher().cut(structure), 8).state_dict()
    state = first.state_dict()
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert not torch.equal(state[f"{block}.to_q.weight"], state[f"{block}.to_k.weight"]), "each tensor draws for itself"
    norms = {n for n, m in first.named_modules() if isinstance(m, torch.nn.GroupNorm | torch.nn.LayerNorm)}
    for name, tensor in state.items():
        assert torch.equal(tensor, other.state_dict()[name]), name
        assert torch.equal(tensor, padded.state_dict()[name]), name
        if name.rpartition(".")[0] in norms:
            assert (tensor == (1.0 if name.endswith("weight") else 0.0)).all(), name
        else:
            assert not torch.equal(tensor, before[name]), name
            assert not torch.equal(tensor, eighth[name]), name


def test_reinitialised_weights_are_distributed_as_torch_initialises():
    """Every bound is 1 / sqrt(fan-in) of the pruned shape, and so is torch's own; large tensors spread alike."""
    structure = Structure.uniform(MINI, 0.5)
    torch.manual_seed(0)
    ours, torchs = reinitialise(UNet(MINI, structure), 0), UNet(MINI, structure)
    for name, module in ours.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            continue
        bound = 1 / math.sqrt(module.weight[0].numel())
        reference = torchs.get_submodule(name)
        for kind in ("weight", "bias"):
            drawn, theirs = getattr(module, kind), getattr(reference, kind)
            if drawn is None:
                continue
            assert drawn.abs().max() <= bound, name
            assert theirs.abs().max() <= bound * (1 + 1e-6), name
            if drawn.numel() > 2000:
                assert drawn.std().item() == pytest.approx(theirs.std().item(), rel=0.05), name
                assert abs(drawn.mean()) < 0.1 * bound, name
    x, c = normal(0, Stream.NOISE, [0], (12, 16, 16)), torch.randn(1, 12, 64)
    assert ours(x, torch.tensor([400]), c).out.isfinite().all()
