"""The dense UNet with gates in front of everything that pruning may remove, one set of gates per sample.

    attention     q, k, v of head i times g_i                   (so g_i^2 on its logits and g_i on its values)
    feed-forward  both halves of the GEGLU of group i times g_i
    ResNet        compat   conv1 + time embedding, group i times g_i, before GroupNorm
                  exact    SiLU(GroupNorm(.)), group i times g_i
    depth         (1 - m) h + m block(h)       h without the skip connection; of sites and of transformer blocks

A gate of 1 changes nothing, and hard gates compute what `UNet.cut` computes: what is learned through them is what
the expert inherits. For ResNets that is true of `exact` only. `compat` is what APTP trains with (arXiv:2406.12042):
GroupNorm divides a soft gate out again, so the network hardly feels it, and behind a group that is zero it leaves SiLU
of the norm's bias, which the expert does not have.

Legend: B batch, C channels, H W latent size, T image tokens, V entries of the architecture vector.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel_fast.models.architecture import UNetConfig, sites
from bilevel_fast.models.layers import Attention, FeedForward, ResNet, Transformer, TransformerBlock, whole
from bilevel_fast.models.unet import Prediction, Sites, UNet
from bilevel_fast.models.vector import layout
from bilevel_fast.ops.dispatch import Branch, attention, group_norm_silu

ResNetGate = Literal["exact", "compat"]


@dataclass(frozen=True, eq=False)
class SiteGates:
    """The gates of one site."""

    widths: Mapping[str, Tensor]
    """(B, units) by the name of the width vector."""
    depth: Tensor | None
    """(B,); None where the vector has no depth entry."""


def split(config: UNetConfig, gates: Tensor) -> dict[str, SiteGates]:
    """Gates (B, V), in the layout of `vector.to_vector`, by site.

    Raises:
        ValueError: The shape is another.
    """
    plan = layout(config)
    widths, depths = plan.split(gates)
    by_site: dict[str, dict[str, Tensor]] = {site.name: {} for site in sites(config)}
    for segment, values in zip(plan.segments, widths, strict=True):
        by_site[segment.site.name][segment.width.name] = values
    depth = {site.name: depths[:, i] for i, site in enumerate(plan.depths)}
    return {name: SiteGates(values, depth.get(name)) for name, values in by_site.items()}


def gated(unet: UNet, x: Tensor, t: Tensor, text: Tensor, gates: Tensor, resnet: ResNetGate = "exact") -> Prediction:
    """What the dense UNet predicts behind gates; differentiable with respect to them, and to whatever else wants it.

    Args:
        unet: Dense. If its `recompute` is set, backward computes the inside of each site again.
        x, t, text: As `UNet.forward`.
        gates: (B, V) in [0, 1], any float dtype.
        resnet: Where the gates of the ResNets lie.

    Raises:
        UserError: The UNet is pruned.
        ValueError: The gates have another shape.
    """
    if gates.shape[:1] != x.shape[:1]:
        raise ValueError(f"{len(x)} samples came with gates of shape {tuple(gates.shape)}")
    by_site = split(unet.config, gates.to(unet.conv_in.weight.dtype))

    def residual(name: str, module: ResNet, h: Tensor, skip: Tensor | None, time: Tensor) -> Tensor:
        site = by_site[name]
        return _resnet(module, h, skip, time, site.widths["groups"], site.depth, resnet)

    def transformer(name: str, module: Transformer, h: Tensor, text: Tensor) -> Tensor:
        site = by_site[name]

        def run(number: int, block: TransformerBlock, h: Tensor | Branch, text: Tensor) -> Tensor:
            if site.widths:  # it is the only block
                return _block(block, h, text, site.widths)
            own, h = by_site[f"{name}.transformer_blocks.{number}"], whole(h)
            return _mix(h, _block(block, h, text, own.widths), own.depth)

        return _mix(h, module(h, text, run), site.depth)

    return unet(x, t, text, Sites(residual, transformer))


def _resnet(
    module: ResNet,
    h: Tensor,
    skip: Tensor | None,
    time: Tensor,
    width: Tensor,
    depth: Tensor | None,
    mode: ResNetGate,
) -> Tensor:
    x = h if skip is None else torch.cat([h, skip], dim=1)
    gate = F.pad(_spread(width, module.inner), (0, module.pad))[:, :, None, None]
    inner, shift = module.conv1(group_norm_silu(x, module.norm1)), module.time_emb_proj(time)
    if mode == "compat":
        inner = group_norm_silu((inner + shift[:, :, None, None]) * gate, module.norm2, module.pad)
    else:
        inner = group_norm_silu(inner, module.norm2, module.pad, shift) * gate
    out = module.conv2(inner) + (x if module.conv_shortcut is None else module.conv_shortcut(x))
    return _mix(h, out, depth)


def _block(module: TransformerBlock, h: Tensor | Branch, text: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
    def attend(name: str, part: Attention, x: Tensor, context: Tensor) -> Tensor:
        return _attention(part, x, context, gates[name])

    return module(h, text, attend, lambda part, x: _feed_forward(part, x, gates["ff"]))


def _attention(module: Attention, x: Tensor, context: Tensor, gate: Tensor) -> Tensor:
    q, k, v = module.to_q(x), module.to_k(context), module.to_v(context)
    gate = _spread(gate, q.shape[-1])[:, None]
    return module.to_out[0](attention(q * gate, k * gate, v * gate, module.heads))


def _feed_forward(module: FeedForward, x: Tensor, gate: Tensor) -> Tensor:
    value, act = module.net[0].proj(x).chunk(2, dim=-1)  # pyright: ignore[reportAttributeAccessIssue,reportCallIssue]
    gate = _spread(gate, value.shape[-1])[:, None]
    return module.net[2](value * gate * F.gelu(act * gate))


def _spread(gate: Tensor, channels: int) -> Tensor:
    """(B, units) -> (B, channels): each gate over the channels of its unit."""
    return gate.repeat_interleave(channels // gate.shape[1], dim=1)


def _mix(h: Tensor, out: Tensor, depth: Tensor | None) -> Tensor:
    return out if depth is None else torch.lerp(h, out, depth.view(-1, *[1] * (h.dim() - 1)))
