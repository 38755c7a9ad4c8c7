"""One oracle for every kernel: be no less accurate than eager PyTorch in the same dtype."""

import torch
from torch import Tensor

SLACK = 2.0  # a different summation order may double eager's worst error, not more


def assert_no_worse_than_eager(name: str, kernel: Tensor, eager: Tensor, gold: Tensor) -> None:
    """Compare the largest errors of `kernel` and `eager`, both measured against `gold` (fp64)."""
    assert gold.dtype == torch.float64, "the gold value must be computed in fp64"
    assert kernel.shape == gold.shape, f"{name}: shape {tuple(kernel.shape)}, expected {tuple(gold.shape)}"
    assert kernel.isfinite().all(), f"{name}: {(~kernel.isfinite()).sum()} non-finite elements"
    error, allowed = (kernel.double() - gold).abs().max(), (eager.double() - gold).abs().max()
    floor = torch.finfo(kernel.dtype).eps * gold.abs().max()
    assert error <= SLACK * allowed + floor, f"{name}: error {error:.3e}, eager has {allowed:.3e}"
