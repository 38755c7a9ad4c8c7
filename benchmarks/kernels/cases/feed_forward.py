"""Backward of SD 2.1's feed-forwards at 512 px to what their first linear returned: dense, and sliced as pruning does.

And of SDXL's at 1024 px (`xl`), dense. Forward is that of `linear_geglu` and `linear_add`, the other products cuBLAS's.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case, Provider, compiled
from benchmarks.kernels.cases.linear_geglu import KEPT, LEVELS, XL
from bilevel_kernels.feed_forward import feed_forward_bwd, feed_forward_bytes, feed_forward_flops
from bilevel_kernels.geglu import geglu_bwd, geglu_ref


def _apart(dy: Tensor, w2: Tensor, h: Tensor, b1: Tensor, _: Tensor) -> object:
    """What the trainer runs otherwise on a GPU."""
    return geglu_bwd((dy @ w2)[None], h[None], b1, None), dy.sum(0)


def _reference(dy: Tensor, w2: Tensor, h: Tensor, b1: Tensor, _: Tensor) -> object:
    _, backward = torch.func.vjp(geglu_ref, h, b1)
    return backward(dy @ w2), dy.sum(0)


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    def case(T: int, C: int, F: int, label: str) -> Case:
        rows = batch * T

        def tensor(*shape: int) -> Tensor:
            make = torch.empty if device.type == "cpu" else torch.randn  # on the CPU kernels are compiled, not run
            return make(*shape, device=device, dtype=dtype)

        def provider(op: Callable[..., object]) -> Provider:
            def make() -> Callable[[], object]:
                inputs = tensor(rows, C), tensor(C, F), tensor(rows, 2 * F), tensor(2 * F), tensor(C)
                return lambda: op(*inputs)

            return make

        providers = {
            "triton": provider(feed_forward_bwd),
            "torch": provider(_apart),
            "compile": compiled(lambda: provider(torch.compile(_reference, dynamic=False))(), device),
        }
        return Case(
            "feed_forward",
            f"{T}x{C}x{F} b{batch} {label} bwd",
            providers,
            feed_forward_bytes(rows, C, F, dtype.itemsize),
            feed_forward_flops(rows, C, F),
            numel=rows * 2 * F,
        )

    return [case(T, C, F * groups // 32, label) for T, C, F in LEVELS for label, groups in KEPT] + [
        case(*level, "xl") for level in XL
    ]
