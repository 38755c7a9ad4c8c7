"""The door to `bilevel_fast._C`: argument checks, pointers, and a clear word when it is not built."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from bilevel_fast.errors import UserError

try:
    from bilevel_fast import _C
except ImportError as error:
    raise ImportError("bilevel_fast._C is not built; run: pip install -e .") from error

__all__ = ["_C", "GroupNorm", "Plan", "plan", "pointer"]

MAX_OPTIONS = 2**16  # back-pointers are 16-bit
MAX_TABLE = 2**31  # bytes of back-pointers


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


class Plan(NamedTuple):
    """One option per group, with what they are worth and cost together."""

    choice: tuple[int, ...]
    value: float
    cost: int


def pointer(tensor: Tensor, dtype: torch.dtype, numel: int) -> int:
    """Address of a CPU tensor that `_C` may read or write as `numel` consecutive elements of `dtype`."""
    assert tensor.device.type == "cpu", f"{tensor.device} tensor handed to native code"
    assert tensor.dtype == dtype, f"{tensor.dtype} tensor where native code takes {dtype}"
    assert tensor.is_contiguous(), f"shape {tuple(tensor.shape)} with strides {tensor.stride()} is not contiguous"
    assert tensor.numel() == numel, f"{tensor.numel()} elements where native code takes {numel}"
    return tensor.data_ptr()


def plan(costs: Sequence[ArrayLike], values: Sequence[ArrayLike], budget: int) -> Plan:
    """Choose one option of every group: the highest total value whose total cost fits the budget.

    Exact: multiple-choice knapsack by dynamic programming (`csrc/planner.hpp`). Time grows with the number of
    options times the budget above the cheapest plan: scale costs so that the budget is some ten thousand
    units, rounding them up if the budget is a hard limit. Of plans of equal value the cheapest is returned.

    Args:
        costs: Per group, the cost of each option in whole units, >= 0.
        values: Per group, the value of each option, finite; any sign.
        budget: Units that the chosen options may cost together.

    Raises:
        UserError: Even the cheapest plan exceeds the budget.
    """
    assert len(costs) == len(values), f"{len(costs)} groups of costs, {len(values)} of values"
    cost_arrays = [np.asarray(c) for c in costs]
    value_arrays = [np.asarray(v, dtype=np.float64) for v in values]
    for g, (c, v) in enumerate(zip(cost_arrays, value_arrays, strict=True)):
        assert c.ndim == 1, f"group {g}: costs of shape {c.shape}"
        assert c.shape == v.shape, f"group {g}: costs {c.shape}, values {v.shape}"
        assert 1 <= c.size <= MAX_OPTIONS, f"group {g}: {c.size} options"
        assert np.issubdtype(c.dtype, np.integer), f"group {g}: costs are {c.dtype}, not whole units"
        assert c.min() >= 0, f"group {g}: a cost is negative"
        assert np.isfinite(v).all(), f"group {g}: a value is not finite"

    least = sum(int(c.min()) for c in cost_arrays)
    if least > budget:
        raise UserError(f"budget of {budget} units is too small: the cheapest plan costs {least}")
    # More than every group's dearest option buys nothing, and would only widen the table.
    budget = min(budget, sum(int(c.max()) for c in cost_arrays))
    table = 2 * len(cost_arrays) * (budget - least + 1)
    assert table <= MAX_TABLE, f"a table of {table} bytes: scale the costs down"

    choice, value, cost = _C.plan(cost_arrays, value_arrays, budget)
    return Plan(tuple(choice), value, cost)
