"""The first linear of SD 2.1's feed-forwards at 512 px and its GEGLU: dense, and sliced to what pruning keeps.

And SDXL's at 1024 px (`xl`), dense.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case, Provider, compiled
from bilevel_kernels.geglu import geglu
from bilevel_kernels.linear_geglu import linear_geglu, linear_geglu_bytes, linear_geglu_flops, linear_geglu_ref

LEVELS = ((4096, 320, 1280), (1024, 640, 2560), (256, 1280, 5120), (64, 1280, 5120))  # tokens, C and F; 32 groups
XL = ((4096, 640, 2560), (1024, 1280, 5120))
KEPT = (("dense", 32), ("0.80 sliced", 25), ("0.55 sliced", 17))


def _apart(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the trainer runs otherwise on a GPU."""
    return geglu(torch.nn.functional.linear(x, weight), bias) if x.is_cuda else linear_geglu_ref(x, weight, bias)


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    def case(T: int, C: int, F: int, label: str, keep: bool) -> Case:
        def tensor(*shape: int) -> Tensor:
            make = torch.empty if device.type == "cpu" else torch.randn  # on the CPU kernels are compiled, not run
            return make(*shape, device=device, dtype=dtype).requires_grad_(keep)

        def provider(op: Callable[..., Tensor]) -> Provider:
            def make() -> Callable[[], object]:
                inputs = tensor(batch, T, C), tensor(2 * F, C), tensor(2 * F)
                return lambda: op(*inputs)

            return make

        providers = {
            "triton": provider(linear_geglu),
            "torch": provider(_apart),
            "compile": compiled(lambda: provider(torch.compile(linear_geglu_ref, dynamic=False))(), device),
        }
        rows = batch * T
        return Case(
            "linear_geglu",
            f"{T}x{C}x{F} b{batch} {label} fwd{' with h' if keep else ''}",
            providers,
            linear_geglu_bytes(rows, C, F, dtype.itemsize, keep),
            linear_geglu_flops(rows, C, F),
            numel=rows * 2 * F,
        )

    return [
        case(T, C, F * groups // 32, label, keep)
        for keep in (False, True)
        for T, C, F in LEVELS
        for label, groups in KEPT
    ] + [case(*level, "xl", keep) for keep in (False, True) for level in XL]
