"""The upper step's loss: SD 2.1's v at 512 px."""

from collections.abc import Callable

import torch
import torch._dynamo
import torch._functorch.config as functorch
from torch import Tensor

from benchmarks.kernels.cases import Case
from benchmarks.measure import Unavailable
from bilevel_kernels.steered_mse import steered_mse, steered_mse_ref

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

READ_AND_WRITTEN = {"fwd": 3, "bwd": 4, "fwd+bwd": 7}  # tensors the size of s


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    shape = (batch, 4, 64, 64)

    def provider(op: Loss, name: str) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            s, a, c = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
            if name == "fwd":
                return lambda: op(s, a, c)
            s.requires_grad_()
            if name == "fwd+bwd":
                return lambda: torch.autograd.grad(op(s, a, c), s)
            loss = op(s, a, c)
            dloss = torch.ones_like(loss)
            return lambda: torch.autograd.grad(loss, s, dloss, retain_graph=True)

        return make

    def compiled(name: str) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            if device.type != "cuda":
                raise Unavailable("compiled for a GPU only")
            functorch.donated_buffer = False  # the same graph is differentiated over and over
            torch._dynamo.reset()  # cases share code: no trace of the shapes before
            return provider(torch.compile(steered_mse_ref, dynamic=False), name)()

        return make

    elements = batch * 4 * 64 * 64
    return [
        Case(
            "steered_mse",
            f"4x64x64 b{batch} {name}",
            {
                "triton": provider(steered_mse, name),
                "torch": provider(steered_mse_ref, name),
                "compile": compiled(name),
            },
            bytes=tensors * elements * dtype.itemsize,
            numel=elements,
        )
        for name, tensors in READ_AND_WRITTEN.items()
    ]
