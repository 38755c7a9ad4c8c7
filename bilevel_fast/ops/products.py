"""Linear layers over one input as one product, where their weights lie one behind the other in memory.

    q, k, v = products(x, to_q, to_k, to_v)      three layers, one matrix product each way
    lay_together(to_q, to_k, to_v)               puts their weights there; training's flat buffer has them so anyway

The layers keep their parameters and names. Backward gives each weight its part of one gradient; it adds no gradients of
x, and copies those of the results only where they do not lie side by side.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bilevel_kernels as triton_ops
from bilevel_fast.ops.providers import asked_for


def products(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """layer(x) of each, (..., C) -> (..., F_i): views of one tensor where it was one product.

    Each on its own where a layer is no plain `nn.Linear` without bias or is watched by hooks, where weights do not lie
    so, while torch.compile traces (it makes its own choice), on a CPU, and where torch is asked to run all ops.
    """
    return _Products.apply(x, *_weights(layers)) if _able(x, layers) else tuple(layer(x) for layer in layers)  # pyright: ignore[reportReturnType]


def lay_together(*layers: nn.Linear) -> None:
    """Move the weights of layers with as many inputs into one piece of memory, unless they lie so. Values stay."""
    weights = _weights(layers)
    if not _adjacent(weights):
        with torch.no_grad():
            whole = torch.cat([w.detach() for w in weights])
        for weight, part in zip(weights, whole.split([len(w) for w in weights]), strict=True):
            weight.data = part


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor):
        ctx.sizes = [len(w) for w in weights]
        whole = _whole(weights, dim=0)
        ctx.save_for_backward(x, *weights)
        return F.linear(x, whole).split(ctx.sizes, dim=-1)

    @staticmethod
    def backward(ctx, *upstream: Tensor):
        x, *weights = ctx.saved_tensors
        given = _whole(upstream, dim=-1) if _adjacent(upstream, dim=-1) else torch.cat(upstream, dim=-1)
        needs_x, *needs = ctx.needs_input_grad
        rows, rows_x = given.reshape(-1, given.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = (rows @ _whole(weights, dim=0)).view_as(x) if needs_x else None
        if not any(needs):
            return dx, *(None for _ in weights)
        parts = (rows.mT @ rows_x).split(ctx.sizes)
        return dx, *(part if need else None for part, need in zip(parts, needs, strict=True))


def _weights(layers: Sequence[nn.Module]) -> list[Tensor]:
    return [layer.weight for layer in layers]  # pyright: ignore[reportReturnType]


def runs(x: Tensor) -> bool:
    """Whether layers over x may be joined: not while torch.compile traces, on a CPU, or where torch is to run all."""
    if torch.compiler.is_compiling() or asked_for() == "torch" or not x.numel():
        return False
    return x.device.type != "cpu" or (triton_ops.INTERPRETED and asked_for() == "triton")


def _able(x: Tensor, layers: Sequence[nn.Module]) -> bool:
    if not runs(x):
        return False
    plain = all(
        type(layer) is nn.Linear and layer.bias is None and not (layer._forward_hooks or layer._forward_pre_hooks)
        for layer in layers
    )
    return plain and _adjacent(_weights(layers))


def _adjacent(parts: Sequence[Tensor], dim: int = 0) -> bool:
    """Whether parts of a dense tensor lie side by side along `dim`, the first or the last, with nothing in between."""
    first = parts[0]
    sizes = [part.shape[dim] for part in parts]
    if dim == 0:
        if not all(part.is_contiguous() for part in parts):
            return False
        strides, steps = first.stride(), [part.numel() for part in parts]
    else:
        strides, steps = _dense((*first.shape[:-1], sum(sizes))), sizes
    return all(
        one.untyped_storage()._cdata == two.untyped_storage()._cdata
        and one.dtype == two.dtype
        and one.storage_offset() + step == two.storage_offset()
        for (one, two), step in zip(pairwise(parts), steps[:-1], strict=True)
    ) and all(part.stride() == strides for part in parts)


def _whole(parts: Sequence[Tensor], dim: int) -> Tensor:
    """What adjacent parts are parts of."""
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return parts[0].as_strided(shape, _dense(shape))


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return tuple(strides)
