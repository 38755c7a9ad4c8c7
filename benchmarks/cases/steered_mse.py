"""The upper step's loss: SD 2.1's v at 512 px."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case
from bilevel_kernels.steered_mse import steered_mse, steered_mse_ref


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    def provider(op: Callable[..., Tensor]) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            s, a, c = (torch.randn(batch, 4, 64, 64, device=device, dtype=dtype) for _ in range(3))
            s.requires_grad_()
            return lambda: torch.autograd.grad(op(s, a, c), s)

        return make

    providers = {"triton": provider(steered_mse), "torch": provider(steered_mse_ref)}
    elements = batch * 4 * 64 * 64
    return [Case("steered_mse", f"4x64x64 b{batch} fwd+bwd", providers, 7 * elements * dtype.itemsize, numel=elements)]
