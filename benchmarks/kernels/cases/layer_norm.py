"""LayerNorm of SD 2.1's Transformers at 512 px behind a residual connection, and of what the projection in returns.

And of SDXL's at 1024 px (`xl`), between the blocks of a Transformer.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case, Provider, compiled
from bilevel_kernels.layer_norm import layer_norm, layer_norm_bytes, layer_norm_ref

EPS = 1e-5
LEVELS = ((4096, 320), (1024, 640), (256, 1280), (64, 1280))  # tokens and channels, which pruning leaves alone
XL = ((4096, 640), (1024, 1280))
WHAT = (("r + bias", True, True), ("r", True, False), ("bias", False, True), ("plain", False, False))


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    def case(T: int, C: int, what: str, r: bool, rbias: bool, backward: bool, xl: str = "") -> Case:
        def tensor(*shape: int) -> Tensor:
            make = torch.empty if device.type == "cpu" else torch.randn  # on the CPU kernels are compiled, not run
            return make(*shape, device=device, dtype=dtype).requires_grad_()

        def provider(op: Callable[..., tuple[Tensor, Tensor]]) -> Provider:
            def make() -> Callable[[], object]:
                inputs = [tensor(batch, T, C), tensor(C), tensor(C)]
                added = {"r": tensor(batch, T, C)} if r else {}
                added |= {"rbias": tensor(C)} if rbias else {}
                call = partial(op, *inputs, EPS, **added)
                if not backward:
                    return call
                h, y = call()
                gradients = (torch.ones_like(h), torch.ones_like(y))
                leaves = [*inputs, *added.values()]
                return lambda: torch.autograd.grad((h, y), leaves, gradients, retain_graph=True)

            return make

        providers = {
            "triton": provider(layer_norm),
            "torch": provider(layer_norm_ref),
            "compile": compiled(lambda: provider(torch.compile(layer_norm_ref, dynamic=False))(), device),
        }
        name = f"{T}x{C} b{batch} {xl}{what} {'bwd' if backward else 'fwd'}"
        numel = batch * T * C
        return Case(
            "layer_norm", name, providers, layer_norm_bytes(numel, dtype.itemsize, r, rbias, backward), numel=numel
        )

    found = [case(*level, *what, backward) for level in LEVELS for what in WHAT for backward in (False, True)]
    return found + [case(*level, *WHAT[0], backward, "xl ") for level in XL for backward in (False, True)]
