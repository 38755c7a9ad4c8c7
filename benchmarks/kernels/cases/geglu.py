"""GEGLU of SD 2.1's feed-forwards at 512 px: dense, sliced to the groups that pruning keeps, and dense with a list.

And SDXL's at 1024 px (`xl`), dense.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu

from benchmarks.kernels.cases import Case, Provider, compiled
from benchmarks.measure import Unavailable
from bilevel_kernels.geglu import geglu, geglu_bytes, geglu_ref
from bilevel_kernels.kept import Kept, counts

LEVELS = ((4096, 1280), (1024, 2560), (256, 5120), (64, 5120))  # tokens and F; 32 groups
XL = ((4096, 2560), (1024, 5120))
KEEP = (0.80, 0.55)


def _liger(value: Tensor, gate: Tensor) -> Tensor:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply(gate, value)


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    def case(T: int, F: int, label: str, kept: Kept | None, backward: bool) -> Case:
        width = counts(kept, F, 1)[0]  # of those that have no list: their tensors are cut

        def tensor(*shape: int) -> Tensor:
            make = torch.empty if device.type == "cpu" else torch.randn
            return make(*shape, device=device, dtype=dtype).requires_grad_()

        def timed(y: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
            if not backward:
                return y
            out = y()
            dy = torch.randn_like(out)
            return lambda: torch.autograd.grad(out, inputs, dy, retain_graph=True)

        def provider(op: Callable[[Tensor, Tensor], Tensor], F: int) -> Provider:
            def make() -> Callable[[], object]:
                x, bias = tensor(batch, T, 2 * F), tensor(2 * F)
                return timed(lambda: op(x, bias), (x, bias))

            return make

        def trainer() -> Callable[[], object]:
            """The product before adds the bias, in its epilogue; its gradient is a pass over that of x."""
            x = tensor(batch, T, 2 * width)

            def op() -> Tensor:
                value, gate = x.chunk(2, dim=-1)
                return value * gelu(gate)

            if not backward:
                return op

            def gradients() -> object:
                (dx,) = torch.autograd.grad(out, x, dout, retain_graph=True)
                return dx, dx.sum((0, 1))

            out, dout = op(), tensor(batch, T, width).detach()
            return gradients

        def liger() -> Callable[[], object]:
            """The tanh approximation, without a bias, from two tensors instead of two halves of one: less work.

            Its backward pass overwrites what it reads: other values in every round, at the same speed.
            """
            if device.type != "cuda":
                raise Unavailable("Liger runs on a GPU only")
            if kept is not None:
                raise Unavailable("Liger has no groups")
            try:
                import liger_kernel.ops.geglu  # noqa: F401
            except ImportError as error:
                raise Unavailable(f"Liger: {error}") from None
            value, gate = tensor(batch, T, F), tensor(batch, T, F)
            return timed(lambda: _liger(value, gate), (value, gate))

        providers = {
            "triton": provider(lambda x, bias: geglu(x, bias, kept=kept), F),
            "torch": trainer,
            "compile": compiled(lambda: provider(torch.compile(geglu_ref), width)(), device),
            "liger (tanh)": liger,
        }
        rows = batch * T
        moved = geglu_bytes(rows, F, width, dtype.itemsize, backward)
        name = f"{T}x{F} b{batch} {label} {'bwd' if backward else 'fwd'}"
        return Case("geglu", name, providers, moved, numel=rows * 2 * F)

    found: list[Case] = []
    for backward in (False, True):
        for T, F in LEVELS:
            found.append(case(T, F, "dense", None, backward))
            for ratio in KEEP:
                groups = int(ratio * 32)
                kept = Kept.same(32, [u * 32 // groups for u in range(groups)])
                found.append(case(T, groups * F // 32, f"{ratio:.2f} sliced", None, backward))
                found.append(case(T, F, f"{ratio:.2f} kept", kept, backward))
    return found + [case(*level, "xl", None, backward) for level in XL for backward in (False, True)]
