"""What each op is measured and compiled on: one module per op, with SD 2.1's shapes, and SDXL's where they differ.

A module has `cases(batch, device, dtype) -> list[Case]`. `benchmarks.kernels.sweep` times every provider of a case in
one interleaved run; `benchmarks.kernels.compile_matrix` calls the `triton` provider once for every target.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import isfunction

import torch
import torch._dynamo
import torch._functorch.config as functorch

import bilevel_kernels
from benchmarks.measure import Unavailable

Provider = Callable[[], Callable[[], object]]

OPS = tuple(op.__module__.rpartition(".")[2] for op in vars(bilevel_kernels).values() if isfunction(op))
"""The modules of the package's functions, in the order of its lines."""

TUNED = (*sorted(OPS, key=lambda op: op == "structured_conv2d"), "mixture")
"""What is measured: convolutions late, as training does not choose them, and a mixture's insides last."""


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        op: Module of bilevel_kernels.
        name: What varies within the op: `320x64x64 b16 0.80 fwd`.
        providers: For each, a function that makes its inputs and returns the call to be timed. It raises
            Unavailable where the provider cannot run.
        bytes: Least bytes that have to move between chip and memory: the roofline of memory-bound ops.
        flops: 2 per multiply-add, for ops with matrix products; 0 for the others.
        numel: Elements of the op's main input, by which `bilevel_fast.ops.providers` chooses.
    """

    op: str
    name: str
    providers: dict[str, Provider] = field(repr=False)
    bytes: int
    flops: int = 0
    numel: int = 0


def compiled(make: Provider, device: torch.device) -> Provider:
    """What torch.compile makes of the reference, as a provider; `make` compiles."""

    def fresh() -> Callable[[], object]:
        if device.type != "cuda":
            raise Unavailable("torch.compile is measured on a GPU only")
        functorch.donated_buffer = False  # the same graph is differentiated over and over
        torch._dynamo.reset()  # cases share code: no trace of the shapes before
        return make()

    return fresh
