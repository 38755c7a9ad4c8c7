"""The insides of a site for rows of several experts, from the weights of the dense UNet.

    resnet         conv1 to the groups that a row keeps, GroupNorm over them, conv2 from them
    attention      q, k and v of the heads that a row keeps, and the projection from them
    feed_forward   both halves of the GEGLU of the groups that a row keeps, and the projection from them

Two providers, and `BILEVEL_FAST_OPS` chooses as it does for the ops of `bilevel_fast.ops.dispatch`:

    triton    every operation is one launch for the whole batch, and reads a row's list of kept channels; what a row
              dropped is neither read nor multiplied. The default on a GPU
    torch     the rows of one list after those of another, narrow: the kept weights are gathered for as long as one
              site of these rows takes. Torch has no operation with a list for each row. The default on the CPU

Legend: B rows, sorted so that equal lists are adjacent; C channels, H W latent size, T image tokens, S keys.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilevel_kernels as triton_ops
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.layers import Attention, FeedForward, ResNet
from bilevel_fast.ops import dispatch as ops
from bilevel_fast.ops.providers import choose
from bilevel_kernels.kept import Kept


def resnet(module: ResNet, x: Tensor, time: Tensor, kept: Kept) -> Tensor:
    """As `ResNet.forward`, of rows that keep some groups.

    Args:
        module: Dense.
        x: (B, C_in, H, W), the skip connection included.
        time: (B, 4 C_0), SiLU of the time embedding.
        kept: Groups of each row.

    Raises:
        UserError: The module stores padding, which lists of groups do not fit.
    """
    if module.pad:
        raise UserError("a mixture wants the dense UNet without padding; build it with align=1")
    conv1, conv2, norm = module.conv1, module.conv2, module.norm2
    assert conv1.bias is not None
    shortcut = x if module.conv_shortcut is None else module.conv_shortcut(x)
    h, shift = ops.group_norm_silu(x, module.norm1), module.time_emb_proj(time)
    if _fused(x):
        h = triton_ops.structured_conv2d(h, conv1.weight, conv1.bias, kept_out=kept, time=shift)
        # groups that a row dropped come out as SiLU of the norm's bias, and conv2 does not read them
        h = ops.group_norm_silu(h, norm)
        return triton_ops.structured_conv2d(h, conv2.weight, conv2.bias, kept_in=kept, residual=shortcut)
    found = []
    for rows, units in _runs(kept, len(x)):
        i = _channels(units, kept.units, norm.num_channels, 1, x.device)
        inner = F.conv2d(h[rows], _take(conv1.weight, 0, i), _take(conv1.bias, 0, i), padding=1)
        inner = inner + _take(shift[rows], 1, i)[:, :, None, None]
        inner = F.group_norm(inner, len(units), _take(norm.weight, 0, i), _take(norm.bias, 0, i), norm.eps)
        found.append(F.conv2d(F.silu(inner), _take(conv2.weight, 1, i), conv2.bias, padding=1))
    return torch.cat(found) + shortcut


def attention(module: Attention, x: Tensor, context: Tensor, kept: Kept) -> Tensor:
    """As `Attention.forward`, of rows that keep some heads: x (B, T, C), context (B, S, D) -> (B, T, C)."""
    q, k, v, out = module.to_q, module.to_k, module.to_v, module.to_out[0]
    assert isinstance(out, nn.Linear)
    if _fused(x):
        queries = _linear(x, q.weight, None, kept_out=kept)
        keys, values = (_linear(context, m.weight, None, kept_out=kept) for m in (k, v))
        heads = triton_ops.pruned_attention(queries, keys, values, module.heads, kept=kept)
        return _linear(heads, out.weight, out.bias, kept_in=kept)
    found = []
    for rows, units in _runs(kept, len(x)):
        i = _channels(units, kept.units, out.in_features, 1, x.device)
        queries = F.linear(x[rows], _take(q.weight, 0, i))
        keys, values = (F.linear(context[rows], _take(m.weight, 0, i)) for m in (k, v))
        heads = ops.attention(queries, keys, values, len(units))
        found.append(F.linear(heads, _take(out.weight, 1, i), out.bias))
    return torch.cat(found)


def feed_forward(module: FeedForward, x: Tensor, kept: Kept) -> Tensor:
    """As `FeedForward.forward`, of rows that keep some groups: x (B, T, C) -> (B, T, C)."""
    proj, out = module.net[0].proj, module.net[2]
    assert isinstance(proj, nn.Linear)
    assert isinstance(out, nn.Linear)
    if _fused(x):
        both = _linear(x, proj.weight, None, kept_out=_twice(kept))
        return _linear(triton_ops.geglu(both, proj.bias, kept=kept), out.weight, out.bias, kept_in=kept)
    found = []
    for rows, units in _runs(kept, len(x)):
        i, both = (_channels(units, kept.units, out.in_features, copies, x.device) for copies in (1, 2))
        value, gate = F.linear(x[rows], _take(proj.weight, 0, both), _take(proj.bias, 0, both)).chunk(2, dim=-1)
        found.append(F.linear(value * F.gelu(gate), _take(out.weight, 1, i), out.bias))
    return torch.cat(found)


def _fused(x: Tensor) -> bool:
    able = ops.triton_runs(x)
    default = "triton" if x.is_cuda else "torch"
    return choose("mixture", x.device, x.numel(), *["triton"] * able, default=default) == "triton"


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, kept_in: Kept | None = None, kept_out: Kept | None = None
) -> Tensor:
    """(B, T, C_in) -> (B, T, C_out): a convolution of 1 x 1 over a map of T x 1 pixels, all of them views."""
    pixels, weight = x.contiguous().transpose(1, 2)[..., None], weight[:, :, None, None]
    out = triton_ops.structured_conv2d(pixels, weight, bias, kept_in=kept_in, kept_out=kept_out)
    return out[..., 0].transpose(1, 2)


@lru_cache(maxsize=1024)
def _twice(kept: Kept) -> Kept:
    """The same units in two halves of an axis twice as long."""
    return Kept(2 * kept.units, tuple((*x, *(u + kept.units for u in x)) for x in kept.lists), kept.rows)


def _runs(kept: Kept, batch: int) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Adjacent rows of one list, and that list."""
    start = 0
    for number, rows in groupby(kept.samples(batch)):
        stop = start + len(list(rows))
        yield slice(start, stop), kept.lists[number]
        start = stop


@lru_cache(maxsize=4096)
def _channels(units: tuple[int, ...], among: int, channels: int, copies: int, device: torch.device) -> Tensor | None:
    """Channel numbers of `units` of `among`, in each of `copies` of an axis of `channels`; None if that is all."""
    if len(units) == among:
        return None
    width = channels // among
    one = (torch.tensor(units)[:, None] * width + torch.arange(width)).flatten()
    return torch.cat([one + channels * copy for copy in range(copies)]).to(device)


def _take(x: Tensor, axis: int, index: Tensor | None) -> Tensor:
    """Some of x along an axis; what is channels_last stays it."""
    if index is None:
        return x
    if x.dim() != 4:
        return x.index_select(axis, index)
    return x.permute(0, 2, 3, 1).index_select(3 if axis == 1 else axis, index).permute(0, 3, 1, 2)
