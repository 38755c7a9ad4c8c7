"""Native code as operators that autograd, tracers and `torch.compile` know. CPU, fp32."""

import torch
from torch import Tensor

from bilevel_fast.ops.native.feature_kd import feature_kd as _feature_kd
from bilevel_fast.ops.native.group_norm import GroupNorm

# --- GroupNorm ------------------------------------------------------------------------------


@torch.library.custom_op("bilevel_fast::group_norm", mutates_args=(), device_types="cpu")
def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, padding: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`GroupNorm.forward`: (out, mean, rstd). Once differentiable, and only `out` is."""
    return GroupNorm(groups, eps, padding, silu).forward(x, weight, bias)


@torch.library.custom_op("bilevel_fast::group_norm_backward", mutates_args=(), device_types="cpu")
def group_norm_backward(
    dout: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    padding: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dout = dout.contiguous(memory_format=torch.channels_last)
    return GroupNorm(groups, eps, padding, silu).backward(dout, x, mean, rstd, weight, bias)


@group_norm.register_fake
def _(x, weight, bias, groups, eps, padding, silu):
    mean, rstd = (x.new_empty(x.shape[0], groups) for _ in range(2))
    return torch.empty_like(x, memory_format=torch.channels_last), mean, rstd


@group_norm_backward.register_fake
def _(dout, x, mean, rstd, weight, bias, groups, eps, padding, silu):
    return torch.empty_like(x, memory_format=torch.channels_last), torch.empty_like(weight), torch.empty_like(bias)


def _setup_group_norm(ctx, inputs, output) -> None:
    x, weight, bias, *ctx.settings = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def _group_norm_backward(ctx, dout, _dmean, _drstd):
    return *group_norm_backward(dout, *ctx.saved_tensors, *ctx.settings), None, None, None, None


group_norm.register_autograd(_group_norm_backward, setup_context=_setup_group_norm)


# --- feature distillation -------------------------------------------------------------------


@torch.library.custom_op("bilevel_fast::feature_kd", mutates_args=(), device_types="cpu")
def feature_kd(student: list[Tensor], teacher: list[Tensor], weight: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`native.feature_kd`: (weight * mean of the terms, terms (K,), gradients). Differentiable once, in the student."""
    terms, gradients = _feature_kd(student, teacher, weight)
    return weight * terms.mean(), terms, gradients


@torch.library.custom_op("bilevel_fast::scale_unless_one", mutates_args=("tensors",), device_types="cpu")
def scale_unless_one(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply the tensors by `factor`, (), in place; where it is 1, nothing is touched."""
    if factor != 1:
        torch._foreach_mul_(tensors, factor)  # pyright: ignore[reportPrivateImportUsage]


@feature_kd.register_fake
def _(student, teacher, weight):
    return student[0].new_empty(()), student[0].new_empty(len(student)), [torch.empty_like(s) for s in student]


@scale_unless_one.register_fake
def _(tensors, factor) -> None:
    return None


def _setup_feature_kd(ctx, inputs, output) -> None:
    _, terms, gradients = output
    ctx.mark_non_differentiable(terms, *gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)


def _feature_kd_backward(ctx, dtotal, _dterms, _dgradients):
    """Scales what the forward pass stored; autograd then refuses a second backward pass through the graph."""
    gradients = list(ctx.saved_tensors)
    scale_unless_one(gradients, dtotal)
    return gradients, [None] * len(gradients), None


feature_kd.register_autograd(_feature_kd_backward, setup_context=_setup_feature_kd)
