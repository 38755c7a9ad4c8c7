"""GroupNorm + SiLU of SD 2.1's ResNets at 512 px: inside, as pruning leaves them, and at the concatenated inputs.

And those of SDXL's at 1024 px (`xl`), dense. Its widths are those of SD 2.1 on four times the pixels.

Those are measured joined, and `in two` tensors as training has them: with the gradient of the connection around.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.cases import Case, Provider, compiled
from benchmarks.measure import Unavailable
from bilevel_kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_and_input,
    group_norm_silu_bytes,
    group_norm_silu_of_two,
    group_norm_silu_ref,
)

EPS = 1e-5
ALIGN = 8  # pruned channels are stored in multiples of this

Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # x, weight, bias, time


@dataclass(frozen=True)
class Layer:
    name: str
    groups: int
    width: int  # channels of a group
    size: int
    has_time: bool
    device: torch.device
    dtype: torch.dtype

    @property
    def channels(self) -> int:
        return self.groups * self.width

    @property
    def padding(self) -> int:
        return -self.channels % ALIGN

    def apply(self, op: Callable[..., Tensor]) -> Forward:
        return lambda x, weight, bias, time: op(
            x, weight, bias, self.groups, EPS, time=time, padding=self.padding, silu=True
        )

    def inputs(self, batch: int, layout: torch.memory_format) -> list[Tensor | None]:
        make = torch.empty if self.device.type == "cpu" else torch.randn  # on the CPU kernels are compiled, not run
        row = self.channels + self.padding
        shapes = [(batch, row, self.size, self.size), (self.channels,), (self.channels,), (batch, row)]
        x, *others = (make(shape, device=self.device, dtype=self.dtype) for shape in shapes)
        leaves = [t.requires_grad_() for t in (x.contiguous(memory_format=layout), *others)]
        return leaves if self.has_time else [*leaves[:3], None]


LEVELS = ((10, 64), (20, 32), (40, 16), (40, 8))  # group width, size
KEPT = (("dense", 32), ("0.80", 25), ("0.55", 17))  # groups
CONCATENATED = ((30, 64), (60, 32), (80, 16))  # never pruned, no time embedding
XL = ((10, 128), (20, 64), (40, 32))
XL_CONCATENATED = ((30, 128), (60, 64), (80, 32))
FIRST = 2 / 3  # of the channels, before the skip connection


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    layers = [Layer(n, g, *level, True, device, dtype) for level in LEVELS for n, g in KEPT]
    layers += [Layer("concatenated", 32, *level, False, device, dtype) for level in CONCATENATED]
    found = [_case(layer, batch, backward) for layer in layers for backward in (False, True)]
    joined = [layer for layer in layers if layer.name == "concatenated"]
    found += [_in_two(layer, batch, backward) for layer in joined for backward in (False, True)]
    inside = [Layer("xl", 32, *level, True, device, dtype) for level in XL]
    found += [_case(layer, batch, backward) for layer in inside for backward in (False, True)]
    joined = [Layer("xl", 32, *level, False, device, dtype) for level in XL_CONCATENATED]
    return found + [_in_two(layer, batch, backward) for layer in joined for backward in (False, True)]


def _in_two(layer: Layer, batch: int, backward: bool) -> Case:
    C, size, settings = layer.channels, layer.size, (layer.groups, EPS)
    split = int(FIRST * C) // 64 * 64

    def provider(op: Callable[..., tuple[Tensor, ...]]) -> Provider:
        """`op` returns the norm, and what goes on around it."""

        def make() -> Callable[[], object]:
            def tensor(*shape: int) -> Tensor:
                filled = torch.empty if layer.device.type == "cpu" else torch.randn
                return filled(shape, device=layer.device, dtype=layer.dtype)

            maps = [
                tensor(batch, c, size, size).contiguous(memory_format=torch.channels_last) for c in (split, C - split)
            ]
            leaves = [t.requires_grad_() for t in (*maps, tensor(C), tensor(C))]
            if not backward:
                return lambda: op(*leaves)
            results = op(*leaves)
            dout, around = (tensor(batch, C, size, size).contiguous(memory_format=torch.channels_last) for _ in "12")
            given = (dout, *around.split([t.shape[1] for t in results[1:]], dim=1))
            return lambda: torch.autograd.grad(results, leaves, given, retain_graph=True)

        return make

    def triton(x: Tensor, more: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out, sources = group_norm_silu_of_two(x, more, weight, bias, *settings)
        return out, *sources

    def joined(x: Tensor, more: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return group_norm_silu_and_input(torch.cat([x, more], 1), weight, bias, *settings)

    def torch_(x: Tensor, more: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        whole = torch.cat([x, more], 1)
        return group_norm_silu_ref(whole, weight, bias, *settings), whole

    numel = batch * C * size**2
    moved = group_norm_silu_bytes(numel, layer.dtype.itemsize, backward) + backward * numel * layer.dtype.itemsize
    label = "xl in two" if layer.name == "xl" else "in two"
    name = f"{C}x{size}x{size} b{batch} {label} {'bwd' if backward else 'fwd'}"
    rivals = {"torch": provider(torch_), "joined": provider(joined)}
    return Case("group_norm_silu", name, {"triton": provider(triton), **rivals}, bytes=moved, numel=numel)


def _case(layer: Layer, batch: int, backward: bool) -> Case:
    def provider(forward: Callable[[Layer], Forward], layout: torch.memory_format = torch.channels_last) -> Provider:
        def make() -> Callable[[], object]:
            call = forward(layer)
            tensors = layer.inputs(batch, layout)
            if not backward:
                return lambda: call(*tensors)
            out = call(*tensors)
            dout = torch.empty_like(out) if out.device.type == "cpu" else torch.randn_like(out)
            wanted = [t for t in tensors if t is not None]
            return lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)

        return make

    providers = {
        "triton": provider(lambda layer: layer.apply(group_norm_silu)),
        "torch": provider(lambda layer: layer.apply(group_norm_silu_ref)),
        "compile": compiled(
            provider(lambda layer: torch.compile(layer.apply(group_norm_silu_ref), dynamic=False)), layer.device
        ),
        "apex": provider(_apex),
        "liger": provider(_liger, torch.contiguous_format),  # its own layout: NCHW
    }
    row = layer.channels + layer.padding
    name = f"{row}x{layer.size}x{layer.size} b{batch} {layer.name} {'bwd' if backward else 'fwd'}"
    numel = batch * row * layer.size**2
    return Case(
        "group_norm_silu",
        name,
        providers,
        bytes=group_norm_silu_bytes(numel, layer.dtype.itemsize, backward),
        numel=numel,
    )


def _apex(layer: Layer) -> Forward:
    try:
        from apex.contrib.group_norm import GroupNorm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise Unavailable(f"apex.contrib.group_norm: {error}") from error
    if layer.groups not in GroupNorm.SUPPORTED_GROUPS or layer.channels not in GroupNorm.SUPPORTED_CHANNELS:
        raise Unavailable(f"apex has no kernel for {layer.groups} groups of {layer.channels} channels")
    norm = GroupNorm(layer.groups, layer.channels, EPS, device=layer.device, dtype=layer.dtype, act="silu")

    def forward(x: Tensor, weight: Tensor, bias: Tensor, time: Tensor | None) -> Tensor:
        norm.weight, norm.bias = weight, bias
        return norm(x if time is None else x + time[:, :, None, None])

    del norm.weight, norm.bias  # plain attributes from now on: the tensors of the case
    return forward


def _liger(layer: Layer) -> Forward:
    try:
        from liger_kernel.ops.group_norm import LigerGroupNormFunction  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise Unavailable(f"liger_kernel: {error}") from error
    if layer.device.type != "cuda":
        raise Unavailable("liger_kernel runs on a GPU only")
    if layer.padding:
        raise Unavailable("liger_kernel knows no padding")

    def forward(x: Tensor, weight: Tensor, bias: Tensor, time: Tensor | None) -> Tensor:
        x = x if time is None else x + time[:, :, None, None]
        # three dimensions: its backward of four is wrong (Liger-Kernel issue 1375)
        y = LigerGroupNormFunction.apply(x.flatten(2), weight, bias, layer.channels, layer.groups, EPS)
        return F.silu(y).view_as(x)

    return forward
