"""A 1x1 convolution of what a branch bypasses, added to the branch where that lies in memory.

    out = widened(h, conv2, (x, skip), widen)          conv2(h) + widen(cat([x, skip]))

Apart, the 1x1 convolution writes a tensor of the size of the result, and the sum reads both and writes a third. As a
product that adds to the branch, it reads and writes that one; and where `linear_add` is Triton's, it goes through two
sources at once instead of through the branch twice. Both biases are added by conv2, and their gradient, which
is one, is summed once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilevel_kernels as triton_ops
from bilevel_fast.ops.dispatch import triton_runs
from bilevel_fast.ops.products import runs
from bilevel_fast.ops.providers import choose


def widened(h: Tensor, conv: nn.Module, sources: tuple[Tensor, ...], widen: nn.Module) -> Tensor | None:
    """conv(h) + widen(the sources one behind the other); None where that is to be done by modules.

    So it is where `products.runs` says no, where one of the two is no plain `nn.Conv2d` or is watched by hooks, or
    where memory is not channels_last.

    Args:
        h: (B, C_inner, H, W), the input of `conv`, whose result is as large as h is.
        conv: The last convolution of a branch.
        sources: (B, C_i, H, W) each.
        widen: The 1x1 convolution, of sum(C_i) channels.
    """
    if not (runs(h) and _plain(conv) and _plain(widen) and all(map(_channels_last, (h, *sources)))):
        return None
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(widen, nn.Conv2d)
    if widen.kernel_size != (1, 1) or widen.stride != (1, 1) or conv.bias is None or widen.bias is None:
        return None
    branch = F.conv2d(h, conv.weight, conv.bias + widen.bias, conv.stride, conv.padding)
    if not _channels_last(branch):
        return None
    able = len(sources) == 2 and all(map(triton_runs, sources)) and widen.weight.dtype == h.dtype
    if choose("linear_add", h.device, branch.numel(), *["triton"] * able) == "triton":
        x, skip = map(_rows, sources)
        rows = triton_ops.linear_add(x, widen.weight.flatten(1), None, _rows(branch), x2=skip)
        return rows.unflatten(0, (len(h), *branch.shape[2:])).permute(0, 3, 1, 2)
    return _Widened.apply(branch, widen.weight, *sources)  # pyright: ignore[reportReturnType]


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx, branch: Tensor, weight: Tensor, *sources: Tensor):
        rows = _rows(branch)
        for part, x in zip(_parts(weight, sources), sources, strict=True):
            rows.addmm_(_rows(x), part.mT)
        ctx.mark_dirty(branch)
        ctx.save_for_backward(weight, *sources)
        return branch

    @staticmethod
    def backward(ctx, *upstream: Tensor):
        (given,), (weight, *sources) = upstream, ctx.saved_tensors
        _, needs_weight, *needs = ctx.needs_input_grad
        rows = _rows(given.contiguous(memory_format=torch.channels_last))
        dweight = torch.empty_like(weight) if needs_weight else None
        if dweight is not None:
            for part, x in zip(_parts(dweight, sources), sources, strict=True):
                torch.mm(rows.mT, _rows(x), out=part)
        if not any(needs):
            return given, dweight, *(None for _ in sources)
        B, _, H, W = given.shape
        whole = (rows @ weight.flatten(1)).view(B, H, W, -1).permute(0, 3, 1, 2)
        parts = whole.split([x.shape[1] for x in sources], dim=1)
        return given, dweight, *(part if need else None for part, need in zip(parts, needs, strict=True))


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) channels_last -> (B * H * W, C), a view."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _parts(weight: Tensor, sources: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
    """Of weights (C_out, sum(C_i), 1, 1), the columns (C_out, C_i) of each source: views."""
    return weight.flatten(1).split([x.shape[1] for x in sources], dim=1)


def _plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Conv2d and not (layer._forward_hooks or layer._forward_pre_hooks)


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
