"""GroupNorm with SiLU of `csrc/group_norm_silu.hpp`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_fast.ops.native import _C
from bilevel_fast.ops.native.pointers import pointer


@dataclass(frozen=True)
class GroupNorm:
    """GroupNorm, and SiLU after it if `silu`, on fp32 channels_last activations (`csrc/group_norm_silu.hpp`).

    Activations are (B, C + padding, H, W), C = weight.numel(); the padding is not read and comes out as zeros.
    Results are the same bits whatever torch.get_num_threads().

    Attributes:
        groups: Divides C.
        eps: Added to the variance.
        padding: Channels after the C real ones.
    """

    groups: int
    eps: float
    padding: int
    silu: bool

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, weight (C,), bias (C,) -> out shaped like x, and mean and rstd (B, groups)."""
        shape = self._shape(x, weight)
        out = torch.empty_like(x, memory_format=torch.channels_last)
        mean, rstd = (x.new_empty(x.shape[0], self.groups) for _ in range(2))
        _C.group_norm_forward(
            *(_pixels(out), _floats(mean), _floats(rstd), _pixels(x)),
            *(_floats(weight), _floats(bias, weight.numel())),
            *(shape, self.eps, self.silu, torch.get_num_threads()),
        )
        return out, mean, rstd

    def backward(
        self, dout: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, weight and bias; dout is shaped like x, mean and rstd are what forward returned."""
        shape = self._shape(x, weight)
        assert dout.shape == x.shape, f"gradient {tuple(dout.shape)} of an output {tuple(x.shape)}"
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        statistics = x.shape[0] * self.groups
        _C.group_norm_backward(
            *(_pixels(dx), _floats(dweight), _floats(dbias), _pixels(dout), _pixels(x)),
            *(_floats(mean, statistics), _floats(rstd, statistics)),
            *(_floats(weight), _floats(bias, weight.numel())),
            *(shape, self.silu, torch.get_num_threads()),
        )
        return dx, dweight, dbias

    def _shape(self, x: Tensor, weight: Tensor) -> tuple[int, int, int, int, int]:
        """Sizes in the order of `_C`, checked: from here on nobody does."""
        samples, total, height, width = x.shape
        channels = weight.numel()
        assert x.numel() > 0, f"no elements in {tuple(x.shape)}"
        assert self.padding >= 0, f"padding of {self.padding} channels"
        assert total == channels + self.padding, f"{total} channels, expected {channels} + {self.padding}"
        assert self.groups > 0, f"{self.groups} groups"
        assert channels % self.groups == 0, f"{self.groups} groups of {channels} channels"
        return samples, height * width, channels, self.padding, self.groups


def _floats(tensor: Tensor, numel: int | None = None) -> int:
    return pointer(tensor, torch.float32, tensor.numel() if numel is None else numel)


def _pixels(tensor: Tensor) -> int:
    """Address of a channels_last tensor (B, C, H, W), C varying fastest."""
    return _floats(tensor.permute(0, 2, 3, 1))
