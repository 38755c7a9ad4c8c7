"""The ResNet convolutions of SD 2.1 at 512 px: conv1 drops output channels, conv2 drops input channels.

`triton` works on dense storage with kept lists; `torch` is what gating code runs, a mask and the dense convolution;
`sliced` is the convolution of the physically pruned model. Both are cuDNN on channels_last tensors.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.cases import Case, Provider, compiled
from bilevel_kernels.kept import Kept, counts
from bilevel_kernels.structured_conv2d import structured_conv2d, structured_conv2d_bytes, structured_conv2d_flops

LEVELS = ((320, 64), (640, 32), (1280, 16), (1280, 8))  # channels, side
UNITS = 32

Conv = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, weight, bias -> out


@dataclass(frozen=True)
class Layer:
    """One convolution of `channels` to `channels`."""

    name: str
    channels: int
    side: int
    batch: int
    kept_in: Kept | None
    kept_out: Kept | None
    device: torch.device
    dtype: torch.dtype

    def make(self, c_in: int, c_out: int) -> list[Tensor]:
        """x, weight, bias; on the CPU, where nothing looks at them, uninitialised."""
        shapes = ((self.batch, c_in, self.side, self.side), (c_out, c_in, 3, 3), (c_out,))
        new = torch.empty if self.device.type == "cpu" else torch.randn
        tensors = [new(shape, device=self.device, dtype=self.dtype) for shape in shapes]
        return [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]

    def kernel(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return structured_conv2d(x, weight, bias, kept_in=self.kept_in, kept_out=self.kept_out)

    def gated(self) -> Conv:
        """Its masks are made beforehand: a model has them on its device."""
        ones = torch.ones((), device=self.device, dtype=self.dtype)
        mask_in, mask_out = (
            lists.mask(self.channels // UNITS, 1, self.device)[:, :, None, None] * ones if lists else None
            for lists in (self.kept_in, self.kept_out)
        )

        def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            out = F.conv2d(x if mask_in is None else x * mask_in, weight, bias, padding=1)
            return out if mask_out is None else out * mask_out

        return conv


def kept(ratio: float) -> Kept:
    """A scattered list of that share of the units; the same one every time."""
    return Kept.same(UNITS, sorted(random.Random(0).sample(range(UNITS), int(ratio * UNITS))))


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    found = []
    for channels, side in LEVELS:
        for label, ratio in (("dense", 1.0), ("0.80", 0.80), ("0.55", 0.55)):
            lists = kept(ratio) if ratio < 1 else None
            sides = {"conv1": (None, lists), "conv2": (lists, None)} if lists else {"conv": (None, None)}
            for name, (kept_in, kept_out) in sides.items():
                layer = Layer(f"{name} {label}", channels, side, batch, kept_in, kept_out, device, dtype)
                found += [_case(layer, backward) for backward in (False, True)]
    return found


def _case(layer: Layer, backward: bool) -> Case:
    dense = layer.channels, layer.channels
    c_in, c_out = (counts(lists, layer.channels, 1)[0] for lists in (layer.kept_in, layer.kept_out))

    def provider(conv: Conv, size: tuple[int, int]) -> Provider:
        return lambda: _call(conv, layer.make(*size), backward)

    def gated() -> Callable[[], object]:
        return _call(layer.gated(), layer.make(*dense), backward)

    pixels = layer.batch * layer.side**2
    return Case(
        "structured_conv2d",
        f"{layer.channels}x{layer.side}x{layer.side} b{layer.batch} {layer.name} {'bwd' if backward else 'fwd'}",
        {
            "triton": provider(layer.kernel, dense),
            "torch": gated,
            "sliced": provider(lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1), (c_in, c_out)),
            "compile": compiled(
                lambda: _call(torch.compile(layer.gated(), dynamic=False), layer.make(*dense), backward), layer.device
            ),
        },
        bytes=structured_conv2d_bytes(pixels, c_in, c_out, 3, layer.dtype.itemsize, backward),
        flops=(2 if backward else 1) * structured_conv2d_flops(pixels, c_in, c_out, 3),
        numel=pixels * layer.channels,
    )


def _call(conv: Conv, inputs: list[Tensor], backward: bool) -> Callable[[], object]:
    if not backward:
        with torch.no_grad():
            conv(*inputs)
        return lambda: torch.no_grad()(conv)(*inputs)
    leaves = [t.requires_grad_() for t in inputs]
    out = conv(*leaves)
    dout = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
