"""What each op is measured and compiled on: one module per op, with SD 2.1's shapes.

A module has `cases(batch, device, dtype) -> list[Case]`. `benchmarks.kernels.sweep` times every provider of a case in
one interleaved run; `benchmarks.kernels.compile_matrix` calls the `triton` provider once for every target.
"""

from collections.abc import Callable
from dataclasses import dataclass, field


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
    providers: dict[str, Callable[[], Callable[[], object]]] = field(repr=False)
    bytes: int
    flops: int = 0
    numel: int = 0


OPS = (
    "group_norm_silu",
    "structured_conv2d",
    "pruned_attention",
    "geglu",
    "feature_kd",
    "denoise_loss",
    "adamw_ema",
)
