"""Linear layers of SD 2.1 at 512 px behind which a LayerNorm comes, of dense and of kept heads, and of a projection in.

And SDXL's at 1024 px (`xl`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case, Provider, compiled
from bilevel_kernels.layer_norm import layer_norm
from bilevel_kernels.linear_norm import linear_norm, linear_norm_bytes, linear_norm_flops, linear_norm_ref

# rows of an image, K, N
LEVELS = {"dense": ((4096, 320, 320), (1024, 640, 640)), "0.80": ((4096, 256, 320), (1024, 512, 640))}
LEVELS |= {"0.55": ((4096, 192, 320), (1024, 384, 640)), "xl": ((4096, 640, 640),)}


def _apart(x: Tensor, w: Tensor, bias: Tensor, r: Tensor | None, gain: Tensor, shift: Tensor, eps: float) -> object:
    """What the trainer runs otherwise on a GPU."""
    if not x.is_cuda:
        return linear_norm_ref(x, w, bias, r, gain, shift, eps)
    h = torch.nn.functional.linear(x, w, bias)
    return layer_norm(h, gain, shift, eps) if r is None else layer_norm(r, gain, shift, eps, r=h)


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    def case(T: int, K: int, N: int, label: str, added: bool) -> Case:
        def tensor(*shape: int) -> Tensor:
            make = torch.empty if device.type == "cpu" else torch.randn  # on the CPU kernels are compiled, not run
            return make(*shape, device=device, dtype=dtype)

        def provider(op: Callable[..., object]) -> Provider:
            def make() -> Callable[[], object]:
                r = tensor(batch, T, N) if added else None
                inputs = tensor(batch, T, K), tensor(N, K), tensor(N), r, tensor(N), tensor(N), 1e-5
                return lambda: op(*inputs)

            return make

        providers = {
            "triton": provider(linear_norm),
            "torch": provider(_apart),
            "compile": compiled(lambda: provider(torch.compile(linear_norm_ref, dynamic=False))(), device),
        }
        rows = batch * T
        return Case(
            "linear_norm",
            f"{T}x{K}x{N} b{batch} {label} fwd{'' if added else ' nothing added'}",
            providers,
            linear_norm_bytes(rows, K, N, dtype.itemsize, added),
            linear_norm_flops(rows, K, N),
            numel=rows * N,
        )

    found = [case(*level, label, True) for label, levels in LEVELS.items() for level in levels]
    return found + [case(*level, "dense", False) for level in LEVELS["dense"]]
