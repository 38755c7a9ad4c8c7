"""The dense UNet, walked site by site: whoever wants another ResNet or Transformer brings it, the rest is the UNet's.

walk(unet, x, t, text, resnet, transformer)     resnet, transformer: called with the site's name and its module
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.unet import (
    Attention,
    Block,
    FeedForward,
    Prediction,
    ResNet,
    Transformer,
    TransformerBlock,
    UNet,
)
from bilevel_fast.ops.dispatch import group_norm, group_norm_silu, layer_norm

RunResNet = Callable[[str, ResNet, Tensor, Tensor | None, Tensor], Tensor]
"""(name, module, h (B, C, H, W), skip connection or None, SiLU of the time embedding (B, 4 C_0)) -> (B, C_out, H, W)"""
RunTransformer = Callable[[str, Transformer, Tensor, Tensor], Tensor]
"""(name, module, h (B, C, H, W), text (B, L, D)) -> (B, C, H, W)"""
Attend = Callable[[str, Attention, Tensor, Tensor], Tensor]
"""("attn1" or "attn2", module, x (B, T, C), context (B, S, D)) -> (B, T, C)"""
Feed = Callable[[FeedForward, Tensor], Tensor]
"""(module, x (B, T, C)) -> (B, T, C)"""


def walk(unet: UNet, x: Tensor, t: Tensor, text: Tensor, resnet: RunResNet, transformer: RunTransformer) -> Prediction:
    """`UNet.forward`, with `resnet` and `transformer` in place of the modules they are given.

    Args:
        unet: Dense. If its `recompute` is set, backward calls them again instead of keeping what they computed.
        x, t, text: As `UNet.forward`.
        resnet, transformer: Compute one site.

    Raises:
        UserError: The UNet is pruned.
    """
    if not unet.structure.is_dense:
        raise UserError("wanted the dense UNet; this one is pruned")
    dtype = unet.conv_in.weight.dtype
    time, text = F.silu(unet.time_embedding(t)), text.to(dtype)
    h = unet.conv_in(x.to(dtype, memory_format=torch.channels_last))
    skips, outputs = [h], []
    modules = (*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block]), *unet.up_blocks)
    for name, block in zip(unet.config.blocks, modules, strict=True):
        assert isinstance(block, Block)
        h = _block(name, block, h, skips, time, text, resnet, transformer)
        outputs.append(h)
    return Prediction(unet.conv_out(group_norm_silu(h, unet.conv_norm_out)), tuple(outputs))


def transform(module: Transformer, x: Tensor, text: Tensor, attend: Attend, feed: Feed) -> Tensor:
    """`Transformer.forward`, with `attend` and `feed` in place of the modules they are given."""
    block = module.transformer_blocks[0]
    assert isinstance(block, TransformerBlock)
    h = group_norm(x, module.norm)
    h = _to_tokens(h) if module.linear else _to_tokens(module.proj_in(h))
    h = module.proj_in(h) if module.linear else h
    n = layer_norm(h, block.norm1)
    h = h + attend("attn1", block.attn1, n, n)
    h = h + attend("attn2", block.attn2, layer_norm(h, block.norm2), text)
    h = h + feed(block.ff, layer_norm(h, block.norm3))
    h = module.proj_out(h) if module.linear else h
    h = h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    return x + (h if module.linear else module.proj_out(h))


def _to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) channels_last -> (B, T, C), a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _block(
    name: str,
    block: Block,
    h: Tensor,
    skips: list[Tensor],
    time: Tensor,
    text: Tensor,
    resnet: RunResNet,
    transformer: RunTransformer,
) -> Tensor:
    def run(function: Callable[..., Tensor], *inputs: object) -> Tensor:
        if block.recompute and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore
        return function(*inputs)

    def residual(j: int, h: Tensor, skip: Tensor | None) -> Tensor:
        return run(resnet, f"{name}.resnets.{j}", block.resnets[j], h, skip, time)

    def attend(j: int, h: Tensor) -> Tensor:
        if not hasattr(block, "attentions"):
            return h
        return run(transformer, f"{name}.attentions.{j}", block.attentions[j], h, text)

    down, up = name.startswith("down"), name.startswith("up")
    if not down and not up:
        return residual(1, attend(0, residual(0, h, None)), None)
    for j in range(len(block.resnets)):
        h = attend(j, residual(j, h, skips.pop() if up else None))
        if down:
            skips.append(h)
    if hasattr(block, "downsamplers"):
        h = block.downsamplers[0](h)  # pyright: ignore[reportIndexIssue]
        skips.append(h)
    if hasattr(block, "upsamplers"):
        h = F.interpolate(h, size=skips[-1].shape[2:], mode="nearest")
        h = block.upsamplers[0](h)  # pyright: ignore[reportIndexIssue]
    return h
