"""The operations of the UNet and its losses that have more than one implementation: called by name from here only.

`providers.choose` picks one per call; each op says which providers can take its inputs. The torch branch is the
definition, the others agree with it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

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
from bilevel_kernels.linear_norm import tiles

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
    """What a branch adds to its residual connection; its last layer is still to be computed, best with the sum.

    Attributes:
        x: (..., C_in), what goes into the last layer, or into the first one of a feed-forward.
        last: The last layer.
        first: The first layer of a feed-forward, whose GEGLU comes between the two.
    """

    x: Tensor
    last: nn.Linear
    first: nn.Linear | None = None

    def whole(self) -> Tensor:
        return self.last(self.inner())

    def inner(self) -> Tensor:
        """What goes into the last layer."""
        return self.x if self.first is None else geglu(self.x, self.first)


def linear(x: Tensor, layer: nn.Module) -> Tensor | Branch:
    """layer(x), for `add` and `add_norm`: left to them where they have a kernel for more than the layer."""
    if not _is_plain(layer):
        return layer(x)
    assert isinstance(layer, nn.Linear)
    return Branch(x, layer) if _is_left(x, layer) else layer(x)


def feed_forward(x: Tensor, net: nn.Module, first: nn.Module, last: nn.Module) -> Tensor | Branch:
    """net(x), `last` behind the GEGLU of `first`, for `add`: left to it where it has a kernel for more than a layer."""
    modules = (net, *net.children(), first, last)
    if all(not (m._forward_hooks or m._forward_pre_hooks) for m in modules) and _is_plain(first) and _is_plain(last):
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        if first.bias is not None and last.bias is not None and _adds(x, last):
            return Branch(x, last, first)
    return net(x)


def _is_plain(layer: nn.Module) -> bool:
    """No other kind of linear layer, such as a LoRA's, and nobody watches it."""
    return type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)


def _is_left(x: Tensor, layer: nn.Linear) -> bool:
    if _adds(x, layer) or choose("linear_norm", x.device, *_asked(x, layer)) == "triton":
        return True
    if layer.bias is None or not (torch.is_grad_enabled() and layer.bias.requires_grad):
        return False
    return _layer_norm_provider(x, x.numel() // layer.in_features * layer.out_features, layer.bias) == "triton"


def _asked(x: Tensor, layer: nn.Linear) -> tuple[Any, ...]:
    """For `choose`: the elements of layer(x), and whether kernels that have its product take it."""
    given = (x, layer.weight, *(t for t in (layer.bias,) if t is not None))
    able = x.numel() > 0 and x.dim() > 1 and triton_runs(x) and layer.weight.dtype == x.dtype
    able = able and all(t.is_contiguous() and t.dtype in _FLOATS for t in given)
    return x.numel() // layer.in_features * layer.out_features, *["triton"] * able


def _adds(x: Tensor, layer: nn.Linear) -> bool:
    """Whether layer(x) is added to something by the product's kernel."""
    return choose("linear_add", x.device, *_asked(x, layer)) == "triton"


def add(x: Tensor, r: Tensor | Branch) -> Tensor:
    """x + r, (..., C) each."""
    if not isinstance(r, Branch):
        return x + r
    if not (x.is_contiguous() and x.dtype == r.x.dtype and _adds(r.x, r.last)):
        return x + r.whole()
    if r.first is None:
        return triton_ops.linear_add(r.x, r.last.weight, r.last.bias, x)
    if choose("feed_forward", r.x.device, *_asked(r.x, r.first)) == "triton":
        return triton_ops.feed_forward(r.x, r.first.weight, r.first.bias, r.last.weight, r.last.bias, x)
    return triton_ops.linear_add(r.inner(), r.last.weight, r.last.bias, x)


def add_norm(x: Tensor | None, r: Tensor | Branch, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """The residual connection x + r, or r alone, and its LayerNorm: (..., C) each.

    Where the LayerNorm is a kernel, its backward sums up the gradient of the branch's last bias as well.

    On the CPU torch 2.11 adds up the gradients of a 16-bit gain and bias in 16 bits: off by a third after 4,096 rows.
    With the affine part by itself they are sums like any other, in fp32.
    """
    if isinstance(r, Branch):
        if _norms(x, r, norm):
            settings = (norm.weight, norm.bias, norm.eps)
            return triton_ops.linear_norm(r.inner(), r.last.weight, r.last.bias, x, *settings)
        found = _branch_norm(x, r, norm)
        if found is not None:
            return found
        if x is not None and _adds(r.x, r.last):
            x, r = None, add(x, r)
        else:
            r = r.whole()
    tensors = (r, norm.weight, norm.bias, *(() if x is None else (x,)))
    if _layer_norm_provider(r, r.numel(), *tensors) == "triton":
        first, second = (r, None) if x is None else (x, r)
        return triton_ops.layer_norm(first, norm.weight, norm.bias, norm.eps, r=second)
    h = r if x is None else x + r
    if h.device.type == "cpu" and h.dtype != torch.float32:
        return h, F.layer_norm(h, norm.normalized_shape, eps=norm.eps) * norm.weight + norm.bias
    return h, norm(h)


def _norms(x: Tensor | None, r: Branch, norm: nn.LayerNorm) -> bool:
    """Whether the last layer, the sum and the LayerNorm are one kernel."""
    if r.last.bias is None or tiles(r.last.out_features) is None or r.x.dtype != r.last.weight.dtype:
        return False
    given = (r.last.bias, norm.weight, norm.bias)
    able = all(t is not None and t.is_contiguous() and t.dtype in (r.x.dtype, torch.float32) for t in given)
    able = able and (x is None or (x.is_contiguous() and x.dtype == r.x.dtype))
    return able and choose("linear_norm", r.x.device, *_asked(r.x, r.last)) == "triton"


def _branch_norm(x: Tensor | None, r: Branch, norm: nn.LayerNorm) -> tuple[Tensor, Tensor] | None:
    """`add_norm` where the bias of the branch is trained and the LayerNorm is a kernel; else None."""
    weight, bias, inner = r.last.weight, r.last.bias, r.inner()
    if bias is None or not (torch.is_grad_enabled() and bias.requires_grad):
        return None
    tensors = (inner, norm.weight, norm.bias, bias, *(() if x is None else (x,)))
    numel = inner.numel() // r.last.in_features * r.last.out_features
    if _layer_norm_provider(inner, numel, *tensors) != "triton":
        return None
    settings = (norm.weight, norm.bias, norm.eps)
    if x is None:
        return triton_ops.layer_norm(F.linear(inner, weight, bias.detach()), *settings, rbias=bias, held=True)
    if x.dtype == inner.dtype and _adds(inner, r.last):
        h = triton_ops.linear_add(inner, weight, bias.detach(), x)
        return triton_ops.layer_norm(h, *settings, rbias=bias, held=True)
    return triton_ops.layer_norm(x, *settings, r=F.linear(inner, weight), rbias=bias)


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
    ours = triton_runs(q)
    able = [name for name, can in (("triton", ours), ("xformers", q.is_cuda and _has_xformers())) if can]
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
    """Whether it has a kernel: its own extension is of one torch; with others 0.0.35 calls those of torch, under the
    names `cutlassF-pt` and `fa2F@...-pt`."""
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
