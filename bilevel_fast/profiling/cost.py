"""What a computation costs, op by op, without a clock: floating-point operations, least traffic.

    with Counter() as counter:
        step()                      # on the CPU, on a GPU, or on the meta device, where nothing is computed
    for line in table(counter.costs): ...

Counted is what torch's dispatcher sees: every op that has work to do on a device, in forward and backward, custom
operators included; views and allocations are not. An op that launches three kernels is one op. Code that does not go
through the dispatcher is not seen: here, AdamW in native code on the CPU.

    flops   2 x multiply-adds of convolutions (dgrad and wgrad apart), matrix products and attention; 0 for the rest.
            Backward of attention counts five products, as FlashAttention-2 (arXiv:2307.08691) does, whoever runs it.
    bytes   every distinct element that is read, read once, and every element written, written once: what no
            implementation of this op can do without. An expanded tensor counts what it holds in memory.

Torch's own counter (`torch.utils.flop_counter`, 2.11) knows neither attention on the CPU, nor groups in a weight
gradient, nor cross-attention where tokens come before heads; so the formulas here are our own.

On the meta device torch would compute attention through a matrix of scores, and its convolutions forget channels_last.
No card does; within `AsOnGPU`, attention is FlashAttention there, and layouts are those of cuDNN.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from math import prod
from pkgutil import iter_modules
from typing import Any, Self

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bilevel_kernels
from bilevel_fast.profiling import meta_memo
from bilevel_fast.training import phases

KINDS = ("conv", "linear", "attention", "norm", "pointwise", "optimizer", "copy", "other")
PRODUCTS = ("conv", "linear", "attention")
"""Kinds that multiply matrices."""


@dataclass(frozen=True)
class Cost:
    """What one op costs."""

    room: str | None
    """Where it was called, see `bilevel_fast.training.phases`."""
    kind: str
    """One of `KINDS`."""
    op: str
    """As torch names it: `aten::mm`."""
    flops: int
    bytes: int


@dataclass(frozen=True)
class Line:
    """The sum over all ops of a room and kind."""

    room: str | None
    kind: str
    launches: int
    flops: int
    bytes: int


def table(costs: Iterable[Cost]) -> list[Line]:
    """Sums by room and kind, in the order of `phases.PHASES` (None last) and `KINDS`."""
    groups: dict[tuple[str | None, str], list[Cost]] = {}
    for cost in costs:
        groups.setdefault((cost.room, cost.kind), []).append(cost)
    order = (*phases.PHASES, None)
    return [
        Line(room, kind, len(found), sum(c.flops for c in found), sum(c.bytes for c in found))
        for (room, kind), found in sorted(groups.items(), key=lambda g: (order.index(g[0][0]), KINDS.index(g[0][1])))
    ]


@cache
def _taught_meta() -> torch.library.Library:
    """From the first call on, in all of this process: attention without mask is FlashAttention's on the meta device,
    and the fused AdamW, for which torch has no stand-in, changes sizes of nothing."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
    library.impl("_fused_adamw_.tensor_lr", lambda *args, **kwargs: None, "Meta")
    return library  # which undoes it when it dies


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.dim() != 4 or attn_mask is not None or enable_gqa:
        options = {"scale": scale, "enable_gqa": enable_gqa}
        return _composite(_SDPA, query, key, value, attn_mask, dropout_p, is_causal, **options)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]


_SDPA = torch.ops.aten.scaled_dot_product_attention.default


@cache
def _is_composite(func: torch._ops.OpOverload) -> bool:
    """Whether an op is nothing but other ops: some have a kernel besides that definition, as the backward of SiLU."""
    has = partial(torch._C._dispatch_has_kernel_for_dispatch_key, func.name())
    return has("CompositeImplicitAutograd") and not has("CPU") and not has("CUDA")


def _composite(func: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """A composite op, as the ops that it is made of."""
    return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


def _as_cudnn(func: torch._ops.OpOverload, args: Any, out: Any) -> Any:
    """The result of an op on the meta device; convolutions return channels_last if x or the weights are."""
    if func is torch.ops.aten.convolution.default:
        operands = args[:2]
    elif func is torch.ops.aten.convolution_backward.default:
        operands = args[1:3]
    else:
        return out
    if operands[0].device.type != "meta" or operands[0].dim() != 4:
        return out
    if all(suggest_memory_format(t) == torch.contiguous_format for t in operands):
        return out
    if isinstance(out, Tensor):
        return torch.empty_like(out, memory_format=torch.channels_last)
    return *(None if t is None else torch.empty_like(t, memory_format=torch.channels_last) for t in out[:2]), out[2]


class AsOnGPU(TorchDispatchMode):
    """Within it, the meta device does as a GPU would where torch's stand-ins do not; other devices are left alone."""

    def __enter__(self) -> Self:
        _taught_meta()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._run(func, args, kwargs or {})[0]

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, meta_memo.Remembered | None]:
        """The result, and where such a call is remembered."""
        key = meta_memo.key(func, args, kwargs)
        found = None if key is None else meta_memo.recall(key)
        if found is not None:
            return found.again(), found
        out = _as_cudnn(func, args, func(*args, **kwargs))
        return out, None if key is None else meta_memo.remember(key, args, kwargs, out)


class Counter(AsOnGPU):
    """Records what runs within it.

    Attributes:
        costs: One entry for each op, in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[Cost] = []

    @property
    def launches(self) -> int:
        """How many ops had work to do on a device."""
        return len(self.costs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        if _is_composite(func):
            with self:  # inference mode leaves such an op whole
                on_meta = func is _SDPA and args[0].device.type == "meta"
                return (_attention if on_meta else partial(_composite, func))(*args, **kwargs)
        out, remembered = self._run(func, args, kwargs)
        if func.is_view:
            return out
        if remembered is None:
            cost = _cost(func, args, kwargs, out)
        elif remembered.cost == ():
            cost = remembered.cost = _cost(func, args, kwargs, out)
        else:
            cost = remembered.cost
        if cost is not None:
            self.costs.append(replace(cost, room=phases.current()))
        return out


# --- an op ----------------------------------------------------------------------------------

_ALLOCATIONS = frozenset(
    ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "resize_", "set_")
)
_READ_BY_HOST = frozenset(("_local_scalar_dense", "equal"))  # no tensor comes back, but the device works
_OVERWRITES = frozenset(
    ("copy_", "zero_", "fill_", "normal_", "uniform_", "random_", "_foreach_copy_", "_foreach_zero_")
)
_PICKS = frozenset(("embedding", "index_select", "index", "gather"))  # read as much of the source as they return

_OURS = {
    info.name: module
    for info in iter_modules(bilevel_kernels.__path__)
    if hasattr(module := import_module(f"bilevel_kernels.{info.name}"), "KIND")
}
"""Modules of kernels by the beginning of their operators' names. KIND is one of `KINDS`. A module may say more: which
arguments are ONLY_WRITTEN or UNTOUCHED; and `operator_flops(name, arguments, result)` where it multiplies matrices."""

# Beginnings of names, or whole names that start with "="
_KIND_OF = {
    "conv": "convolution cudnn_convolution _convolution _slow_conv mkldnn_convolution",
    "attention": "_scaled_dot_product _flash_attention _efficient_attention efficient_attention "
    "flash_ =bmm =baddbmm _softmax _safe_softmax",
    "linear": "=mm =mv =dot =addmm =addmm_ =addmv =_scaled_mm",
    "norm": "native_group_norm native_layer_norm group_norm native_batch_norm cudnn_batch_norm",
    "optimizer": "_fused_adam _fused_sgd",
    "copy": "_to_copy =clone copy_ _foreach_copy_ =cat =stack =repeat _local_scalar_dense slice_backward "
    "select_backward constant_pad_nd",
    "pointwise": "_foreach_ =ones =zeros =full new_ "
    "arange scalar_tensor mse_loss gelu silu normal_ uniform_ random_ zero_ fill_",
}


def _kind(func: torch._ops.OpOverload, name: str) -> str:
    for kind, patterns in _KIND_OF.items():
        if any(name == p[1:] if p[0] == "=" else name.startswith(p) for p in patterns.split()):
            return kind
    return "pointwise" if torch.Tag.pointwise in func.tags or name.endswith("_like") else "other"


def _cost(func: torch._ops.OpOverload, args: Any, kwargs: Any, out: Any) -> Cost | None:
    name = func._schema.name.partition("::")[2]
    if name in _ALLOCATIONS:
        return None
    schema = func._schema
    given = {a.name: value for a, value in zip(schema.arguments, args, strict=False)} | kwargs
    ours = next((module for op, module in _OURS.items() if name.startswith(op)), None)
    reads, writes = _operands(schema, name, given, ours)
    held = {_storage(t) for t in (*reads, *writes)}
    made = [t for t in _tensors(out) if _storage(t) not in held]
    if not (made or writes or ours or name in _READ_BY_HOST):
        return None  # a view, or nothing at all
    if name in _PICKS and reads:
        moved = 2 * _held_bytes(made) + _held_bytes([t for t in reads if not t.is_floating_point()])
    else:
        moved = _held_bytes(reads) + _held_bytes(writes) + _held_bytes(made)
    flops = getattr(ours, "operator_flops", _flops)(name, given, out)
    kind = ours.KIND if ours else _kind(func, name)
    return Cost(phases.current(), kind, schema.name, flops, moved) if moved else None


def _operands(schema: Any, name: str, given: dict[str, Any], ours: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors among the arguments that are read, and those that are written."""
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    untouched, only_written = (getattr(ours, said, ()) for said in ("UNTOUCHED", "ONLY_WRITTEN"))
    for argument in schema.arguments:
        if argument.name in untouched:
            continue
        found = list(_tensors(given.get(argument.name)))
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and argument.name == "grads" and given.get("grad_scale") is None:
            written = False  # a fused optimizer writes gradients where it unscales them
        overwritten = argument.kwarg_only or name in _OVERWRITES or argument.name in only_written
        if written:
            writes += found
        if not written or not overwritten:
            reads += found
    return reads, writes


def _tensors(value: Any) -> Iterator[Tensor]:
    return (t for t in tree_leaves(value) if isinstance(t, Tensor))


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _held_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct elements that tensors address.

    Views of one storage count no more than the span that they cover together; exact for equal views, transposes and
    the parts of a split.
    """
    spans: dict[int, list[tuple[int, int, int]]] = {}  # of each storage: first byte, end, bytes used in between
    for t in tensors:
        shape = [(size, stride) for size, stride in zip(t.shape, t.stride(), strict=True) if stride]
        if not t.numel():
            continue
        start = int(t.storage_offset()) * t.itemsize
        end = start + (sum((size - 1) * stride for size, stride in shape) + 1) * t.itemsize
        used = min(prod(size for size, _ in shape) * t.itemsize, end - start)
        spans.setdefault(_storage(t), []).append((start, end, used))
    total = 0
    for found in spans.values():
        low, high, used = 0, 0, 0
        for start, end, mine in sorted(set(found)):
            if start >= high:
                total += min(used, high - low)
                low, high, used = start, end, 0
            high, used = max(high, end), used + mine
        total += min(used, high - low)
    return total


# --- formulas -------------------------------------------------------------------------------

_FACTORS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "_scaled_mm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "addmm_": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
}


def _flops(name: str, given: dict[str, Any], out: Any) -> int:
    if name in ("convolution", "_convolution", "cudnn_convolution", "convolution_overrideable", "_slow_conv2d_forward"):
        x = given["input"] if "input" in given else given["self"]
        return _conv(x, given["weight"], out, given.get("transposed", False))
    if name == "convolution_backward":
        once = _conv(given["input"], given["weight"], given["grad_output"], given["transposed"])
        return once * sum(given["output_mask"][:2])
    if name in _FACTORS:
        left, right = (given[factor] for factor in _FACTORS[name])
        return 2 * left.numel() * right.shape[-1]
    if name.startswith(("_scaled_dot_product", "_flash_attention", "_efficient_attention")) and "query" in given:
        tokens = 1 if name.startswith(("_flash", "_efficient")) else 2  # the axis of the tokens
        queries, keys = given["query"].numel(), given["key"].shape[tokens]
        outputs = queries // given["query"].shape[-1] * given["value"].shape[-1]
        # scores and output; backward: scores again, dq and dk; dv and the gradient of the weights
        return 2 * keys * (3 * queries + 2 * outputs if "backward" in name else queries + outputs)
    return 0


def _conv(x: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> int:
    """2 x multiply-adds; the two gradients have as many each. weight is (C_out, C_in / groups, ...)."""
    return 2 * (x if transposed else out).numel() * prod(weight.shape[1:])
