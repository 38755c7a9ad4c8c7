"""Linear layers of SD 2.1 at 512 px, added to what they bypass: projections, of dense and kept heads, and shortcuts.

And SDXL's projections at 1024 px (`xl`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case, Provider, compiled
from bilevel_kernels.linear_add import linear_add, linear_add_bytes, linear_add_flops, linear_add_ref

# rows of an image, C, C of a second tensor, N
LEVELS = {"dense": ((4096, 320, 0, 320), (1024, 640, 0, 640), (256, 1280, 0, 1280), (64, 1280, 0, 1280))}
LEVELS |= {"0.80": ((4096, 256, 0, 320), (1024, 512, 0, 640)), "0.55": ((4096, 192, 0, 320), (1024, 384, 0, 640))}
LEVELS |= {"two": ((4096, 640, 320, 320), (1024, 1280, 640, 640)), "xl": ((4096, 640, 0, 640), (1024, 1280, 0, 1280))}


def _torch(x: Tensor, weight: Tensor, bias: Tensor, r: Tensor, x2: Tensor | None) -> Tensor:
    return linear_add_ref(x, weight, bias, r, x2=x2)


def _triton(x: Tensor, weight: Tensor, bias: Tensor, r: Tensor, x2: Tensor | None) -> Tensor:
    return linear_add(x, weight, bias, r, x2=x2)


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    def case(T: int, C: int, C2: int, N: int, label: str) -> Case:
        def tensor(*shape: int) -> Tensor:
            make = torch.empty if device.type == "cpu" else torch.randn  # on the CPU kernels are compiled, not run
            return make(*shape, device=device, dtype=dtype)

        def provider(op: Callable[..., Tensor]) -> Provider:
            def make() -> Callable[[], object]:
                inputs = tensor(batch, T, C), tensor(N, C + C2), tensor(N), tensor(batch, T, N)
                x2 = tensor(batch, T, C2) if C2 else None
                return lambda: op(*inputs, x2)

            return make

        providers = {
            "triton": provider(_triton),
            "torch": provider(_torch),
            "compile": compiled(lambda: provider(torch.compile(_torch, dynamic=False))(), device),
        }
        rows = batch * T
        return Case(
            "linear_add",
            f"{T}x{C + C2}x{N} b{batch} {label} fwd",
            providers,
            linear_add_bytes(rows, C + C2, N, dtype.itemsize),
            linear_add_flops(rows, C + C2, N),
            numel=rows * N,
        )

    return [case(*level, label) for label, levels in LEVELS.items() for level in levels]
