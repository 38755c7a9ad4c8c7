"""Random UNets, structures and inputs, and how far two results are apart."""

import dataclasses
import random

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed.diffusers_unet import Hooked
from bilevel_fast.models.architecture import UNetConfig, sites, with_blocks
from bilevel_fast.models.conditioning import pack
from bilevel_fast.models.sdxl import SDXL
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet

SDXL_LIKE = dataclasses.replace(
    SDXL, sample_size=16, block_out_channels=(16, 32, 32), num_heads=(2, 2, 4), norm_num_groups=8,
    cross_attention_dim=24, addition_time_embed_dim=4, projection_class_embeddings_input_dim=16 + 6 * 4,
    layers_per_block=1, transformer_layers_per_block=((1,), (2,), (2,)),
    reverse_transformer_layers_per_block=((3, 2), (1, 2), 1),
)  # fmt: skip
"""Small, and with Transformers of one, two and three blocks."""


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
    """x, t and text for `UNet.forward`: latents of `side` x `side`, 5 tokens, and what else the UNet is told.

    Below 16 the innermost level of four is one token, and softmax over one token has no gradient.
    """
    x = torch.randn(batch, config.in_channels, side, side, dtype=dtype)
    t, text = torch.randint(0, 1000, (batch,)), torch.randn(batch, 5, config.cross_attention_dim, dtype=dtype)
    if config.pooled_dim:
        sizes = torch.randint(0, 1024, (batch, 6))
        text = pack(text, torch.randn(batch, config.pooled_dim, dtype=dtype), sizes)
    return x, t, text


def random_structure(config: UNetConfig, seed: int, drop: float) -> Structure:
    """Any units, at least one of each vector; of the sites that can go, the share `drop` is gone."""
    draw = random.Random(seed)
    dropped = with_blocks(config, frozenset(s.name for s in sites(config) if s.droppable and draw.random() < drop))
    kept = {
        s.name: {w.name: tuple(sorted(draw.sample(range(w.units), draw.randint(1, w.units)))) for w in s.widths}
        for s in sites(config)
        if s.name not in dropped
    }
    return Structure(config, kept, dropped)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_equals_diffusers(ours: UNet, theirs, tolerance: float = 1e-4) -> None:
    """Outputs, block outputs and all gradients, from the same random weights; keys are the same as well."""
    randomise(theirs, 0.05)
    ours.load_state_dict(theirs.state_dict())  # strict
    given = inputs(ours.config)

    theirs_out, blocks = Hooked(theirs)(*given)
    prediction = ours(*given)

    assert relative(prediction.out, theirs_out) <= tolerance
    assert len(prediction.blocks) == len(blocks) == len(ours.config.blocks)
    for ours_block, theirs_block in zip(prediction.blocks, blocks, strict=True):
        assert relative(ours_block, theirs_block) <= tolerance

    upstream = torch.randn_like(theirs_out)
    theirs_out.backward(upstream)
    prediction.out.backward(upstream)
    gradients = dict(theirs.named_parameters())
    for key, p in ours.named_parameters():
        assert p.grad is not None
        assert relative(p.grad, gradients[key].grad) <= tolerance, key


def flops_and_params(structure: Structure, latent: int, text: int, align: int = 1) -> tuple[int, int]:
    """FLOPs of a forward pass by torch's own counter, and parameters; without memory."""
    config = structure.config

    def added(_: torch.Size, a: torch.Size, b: torch.Size, *__: object, **___: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    # torch's counter leaves that one out
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added})
    with torch.device("meta"), torch.no_grad(), counter:
        model = UNet(config, structure, align)
        states = torch.empty(1, text + config.extra_rows, config.cross_attention_dim)
        model(torch.empty(1, config.in_channels, latent, latent), torch.empty(1), states)
    return counter.get_total_flops(), sum(p.numel() for p in model.parameters())
