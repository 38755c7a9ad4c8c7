"""The operations of the UNet and its losses that have more than one implementation: called by name from here only.

`providers.choose` picks one per call; each op says which providers can take its inputs. The torch branch is the
definition, the others agree with it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import bilevel_kernels as triton_ops
from bilevel_fast.ops import providers
from bilevel_fast.ops.native import operators as native
from bilevel_fast.ops.native.cuda import is_built
from bilevel_fast.ops.products import runs
from bilevel_fast.ops.providers import choose
from bilevel_kernels.group_norm_silu import group_norm_silu_and_input as group_norm_with_input
from bilevel_kernels.group_norm_silu import group_norm_silu_of_two as norm_of_two

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def group_norm_silu(x: Tensor, norm: nn.GroupNorm, padding: int = 0, time: Tensor | None = None) -> Tensor:
    """SiLU(GroupNorm(x + time)) over the real channels of x; `padding` zero channels are passed on as zeros.

    Args:
        x: (B, C + padding, H, W). Statistics are taken over the first C = norm.num_channels channels.
        norm: Groups, affine parameters and epsilon.
        padding: Channels at the end that only align the storage.
        time: (B, C + padding), added to every pixel before the norm.
    """
    return _group_norm(x, norm, padding, time, silu=True)[0]


def group_norm_silu_and_input(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """SiLU(GroupNorm(x)), and x for the residual connection around it.

    Go on with the second result instead of x: where a kernel can, backward then adds the gradients of both uses of x
    while it computes the norm's. It is x, or shares its memory; leave it as it is.
    """
    return _group_norm(x, norm, padding=0, time=None, silu=True, again=True)


def group_norm_silu_of_two(x: Tensor, skip: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, tuple[Tensor, ...]]:
    """SiLU(GroupNorm) of x and a skip connection one behind the other, and both for the connection around the norm.

    Args:
        x, skip: (B, C_i, H, W).

    Returns:
        (B, C, H, W), and what to go on with: both, or one tensor that holds both where they had to be joined.
    """
    known = _group_norm_providers(x, norm) if runs(x) and x.dtype == skip.dtype else []
    able = "triton" in known and bool(skip.numel()) and skip.is_contiguous(memory_format=torch.channels_last)
    if choose("group_norm_silu", x.device, x.numel() + skip.numel(), *["triton"] * able) == "triton":
        return norm_of_two(x, skip, norm.weight, norm.bias, norm.num_groups, norm.eps)
    h, x = group_norm_silu_and_input(torch.cat([x, skip], dim=1), norm)
    return h, (x,)


def group_norm_and_input(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """GroupNorm(x), and x; as `group_norm_silu_and_input` without the SiLU."""
    return _group_norm(x, norm, padding=0, time=None, silu=False, again=True)


def _group_norm(
    x: Tensor, norm: nn.GroupNorm, padding: int, time: Tensor | None, silu: bool, again: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm, and what to go on with in place of x."""
    provider = choose("group_norm_silu", x.device, x.numel(), *_group_norm_providers(x, norm))
    if provider == "triton":
        settings = (norm.weight, norm.bias, norm.num_groups, norm.eps)
        if again:
            return group_norm_with_input(x, *settings, time=time, padding=padding, silu=silu)
        return triton_ops.group_norm_silu(x, *settings, time=time, padding=padding, silu=silu), x
    h = x if time is None else x + time[:, :, None, None]
    if provider == "native":
        return native.group_norm(h, norm.weight, norm.bias, norm.num_groups, norm.eps, padding, silu)[0], x
    y = norm(h[:, : norm.num_channels] if padding else h)
    return F.pad(F.silu(y) if silu else y, (0, 0, 0, 0, 0, padding)) if padding else F.silu(y) if silu else y, x


def _group_norm_providers(x: Tensor, norm: nn.GroupNorm) -> list[str]:
    if x.dim() != 4 or not x.numel() or not norm.affine or not x.is_contiguous(memory_format=torch.channels_last):
        return []
    able = []
    if x.device.type == "cpu" and all(t.dtype == torch.float32 for t in (x, norm.weight, norm.bias)):
        able.append("native")
    if triton_runs(x):
        able.append("triton")
    return able


def triton_runs(x: Tensor) -> bool:
    """On a GPU; on the CPU in Triton's interpreter only, which tests turn on; on meta, to be counted, if asked for."""
    return x.dtype in _FLOATS and (x.is_cuda or x.is_meta or (x.device.type == "cpu" and triton_ops.INTERPRETED))


@dataclass(frozen=True)
class Branch:
    """What a branch adds to its residual connection, but for the bias of its last layer.

    Attributes:
        value: (..., C), the last layer's product.
        bias: (C,), still to be added.
    """

    value: Tensor
    bias: Tensor

    def whole(self) -> Tensor:
        return self.value + self.bias


def linear(x: Tensor, layer: nn.Module) -> Tensor | Branch:
    """layer(x), for `add_norm` alone: a trained bias is left to it where its backward sums up that gradient anyway."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return layer(x)
    bias: Tensor | None = layer.bias
    numel = x.numel() // layer.in_features * layer.out_features
    if bias is None or not (torch.is_grad_enabled() and bias.requires_grad):
        return layer(x)
    if _layer_norm_provider(x, numel, bias) != "triton":
        return layer(x)
    return Branch(F.linear(x, layer.weight), bias)


def add_norm(x: Tensor | None, r: Tensor | Branch, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """The residual connection x + r, or r alone, and its LayerNorm: (..., C) each.

    On the CPU torch 2.11 adds up the gradients of a 16-bit gain and bias in 16 bits: off by a third after 4,096 rows.
    With the affine part by itself they are sums like any other, in fp32.
    """
    value, rbias = (r.value, r.bias) if isinstance(r, Branch) else (r, None)
    tensors = (value, norm.weight, norm.bias, *(t for t in (x, rbias) if t is not None))
    if _layer_norm_provider(value, value.numel(), *tensors) == "triton":
        first, second = (value, None) if x is None else (x, value)
        return triton_ops.layer_norm(first, norm.weight, norm.bias, norm.eps, r=second, rbias=rbias)
    r = r.whole() if isinstance(r, Branch) else r
    h = r if x is None else x + r
    if h.device.type == "cpu" and h.dtype != torch.float32:
        return h, F.layer_norm(h, norm.normalized_shape, eps=norm.eps) * norm.weight + norm.bias
    return h, norm(h)


def _layer_norm_provider(x: Tensor, numel: int, *tensors: Tensor | None) -> str:
    able = numel > 0 and x.dim() > 1 and triton_runs(x)
    able = able and all(t is not None and t.is_contiguous() and t.dtype in (x.dtype, torch.float32) for t in tensors)
    return choose("layer_norm", x.device, numel, *["triton"] * able)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, head by head.

    Args:
        q: (B, T, heads * head_dim).
        k, v: (B, S, heads * head_dim).

    Returns:
        (B, T, heads * head_dim).
    """
    able = [name for name, can in (("triton", triton_runs(q)), ("xformers", q.is_cuda and _has_xformers())) if can]
    provider = choose("pruned_attention", q.device, q.numel(), *able)
    if provider == "triton":
        return triton_ops.pruned_attention(q, k, v, heads)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    if provider == "xformers":
        return import_module("xformers.ops").memory_efficient_attention(q, k, v).flatten(-2)
    with _backends(q.device):
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2).flatten(-2)


def _backends(device: torch.device) -> AbstractContextManager[object]:
    """cuDNN first on sm_90 and newer: torch's FlashAttention 2 was made for the cards before.

    Which cards have it and which shapes it takes, torch knows; the others follow.
    """
    here = providers.architecture(device)
    if not here.startswith("sm_") or int(here[3:]) < 90:
        return nullcontext()
    order = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel(list(order), set_priority=True)


@cache
def _has_xformers() -> bool:
    """Whether its extension was built for this torch: without it the package imports, and every call fails."""
    try:
        return import_module("xformers.ops.fmha").cutlass.FwOp.is_available()
    except (ImportError, OSError, AttributeError):
        return False


def missing(device: torch.device) -> dict[str, str]:
    """Providers that cannot run on a device, each with the reason and, where there is one, the command that helps."""
    cuda = device.type == "cuda"
    able = {
        "native": (device.type == "cpu", "its code is for the CPU"),
        "triton": (cuda or triton_ops.INTERPRETED, "it wants a GPU"),
        "cuda": (
            cuda and is_built(),
            "bilevel_fast.ops.native._cuda is not built; with nvcc on the PATH, run: pip install -e .",
        ),
        "xformers": (
            cuda and _has_xformers(),
            "xformers does not load; for the torch that is here: pip install xformers",
        ),
    }
    return {name: reason for name, (can, reason) in able.items() if not can}


def geglu(x: Tensor, proj: nn.Linear) -> Tensor:
    """The first half of proj(x) times the exact GELU of the second: (..., C) -> (..., F) (arXiv:2002.05202)."""
    numel = x.numel() // proj.in_features * proj.out_features
    weight, ours = proj.weight, type(proj) is nn.Linear and triton_runs(x)  # others add to it, such as a LoRA's
    able = ours and x.numel() > 0 and weight.dtype == x.dtype and x.is_contiguous() and weight.is_contiguous()
    if choose("linear_geglu", x.device, numel, *["triton"] * able) == "triton":
        return triton_ops.linear_geglu(x, weight, proj.bias)
    if choose("geglu", x.device, numel, *["triton"] * ours) == "triton":
        return triton_ops.geglu(F.linear(x, weight), proj.bias)
    value, gate = proj(x).chunk(2, dim=-1)
    return value * F.gelu(gate)


def denoise_loss(
    student: Tensor,
    target: Tensor,
    teacher: Tensor,
    weight: Tensor,
    w_diffusion: float,
    w_output: float,
) -> tuple[Tensor, Tensor]:
    """w_diffusion mean_b[weight_b mean (s_b - target_b)^2] + w_output mean (s - teacher)^2, and the two terms.

    Args:
        student: (B, ...) prediction; receives the gradient of the first result.
        target: What is to be predicted, and
        teacher: what the teacher predicts: constants of the student's shape.
        weight: (B,) of each sample in the diffusion loss.
        w_diffusion, w_output: Weights, not both 0. A term of weight 0 is not computed, whatever tensors it gets, and
            reported as 0.

    Returns:
        () and (2,), fp32; the terms are before weighting, and detached.
    """
    inputs = [student] + [target] * bool(w_diffusion) + [teacher] * bool(w_output)
    able = all(map(triton_runs, inputs)) and _agree([(student, x) for x in inputs])
    if choose("denoise_loss", student.device, student.numel(), *["triton"] * able) == "triton":
        return triton_ops.denoise_loss(student, target, teacher, weight, w_diffusion, w_output)
    s, zero = student.float(), torch.zeros((), device=student.device)
    diffusion = (weight * (s - target.float()).square().flatten(1).mean(1)).mean() if w_diffusion else zero
    output = F.mse_loss(s, teacher.float()) if w_output else zero
    return w_diffusion * diffusion + w_output * output, torch.stack([diffusion, output]).detach()


def feature_kd(student: Sequence[Tensor], teacher: Sequence[Tensor], weight: float) -> tuple[Tensor, Tensor]:
    """`weight` times the mean over k of mean (s_k - t_k)^2, and that mean itself.

    Args:
        student: K tensors; receive the gradient of the first result.
        teacher: K constants of the same shapes.
        weight: Factor of the first result.

    Returns:
        Two scalars in fp32; the second is detached.
    """
    pairs = list(zip(student, teacher, strict=True))
    able = []
    if all(t.device.type == "cpu" and t.dtype == torch.float32 for pair in pairs for t in pair) and _agree(pairs):
        able.append("native")
    if all(triton_runs(t) for pair in pairs for t in pair) and _agree(pairs):
        able.append("triton")
    provider = choose("feature_kd", student[0].device, sum(s.numel() for s in student), *able)
    if provider == "native":
        total, terms, _ = native.feature_kd(list(student), list(teacher), weight)
    elif provider == "triton":
        total, terms = triton_ops.feature_kd(student, teacher, weight)
    else:
        terms = torch.stack([F.mse_loss(s.float(), t.float()) for s, t in pairs])
        total = weight * terms.mean()
    return total, terms.detach().mean()


def _agree(pairs: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether both of each pair lie in memory alike, without gaps."""
    return all(s.stride() == t.stride() and _is_dense(s) for s, t in pairs)


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
