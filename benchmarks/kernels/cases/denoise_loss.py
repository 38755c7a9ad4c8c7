"""The lower step's loss on the prediction: SD 2.1's v at 512 px, with what the teacher and the data say in fp32."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case, Provider, compiled
from bilevel_kernels.denoise_loss import denoise_loss, denoise_loss_bytes, denoise_loss_ref

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    shape = (batch, 4, 64, 64)

    def provider(op: Loss) -> Provider:
        def make() -> Callable[[], object]:
            s, teacher = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
            target, weight = torch.randn(shape, device=device), torch.rand(batch, device=device)
            s.requires_grad_()
            return lambda: torch.autograd.grad(op(s, target, teacher, weight)[0], s)

        return make

    providers = {"triton": provider(denoise_loss), "torch": provider(denoise_loss_ref)}
    providers["compile"] = compiled(lambda: provider(torch.compile(denoise_loss_ref))(), device)
    elements = batch * 4 * 64 * 64
    moved = denoise_loss_bytes(elements, dtype.itemsize)
    return [Case("denoise_loss", f"4x64x64 b{batch} fwd+bwd", providers, moved, numel=elements)]
