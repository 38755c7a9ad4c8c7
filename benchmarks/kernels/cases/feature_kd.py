"""Feature distillation over the nine block outputs of SD 2.1 at 512 px, and over the seven of SDXL at 1024 px.

Backward alone is no case: the gradient is written in the forward pass, and a graph runs backward once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case, Provider, compiled
from bilevel_kernels.feature_kd import feature_kd, feature_kd_bytes, feature_kd_ref

# after the down- and upsamplers: down_blocks.0-3, mid_block, up_blocks.0-3; pruning leaves them alone
BLOCKS = [(320, 32), (640, 16), (1280, 8), (1280, 8), (1280, 8), (1280, 16), (1280, 32), (640, 64), (320, 64)]
XL = [(320, 64), (640, 32), (1280, 32), (1280, 32), (1280, 64), (640, 128), (320, 128)]  # three down, mid, three up
WEIGHT = 0.1

Op = Callable[[list[Tensor], list[Tensor], float], tuple[Tensor, Tensor]]


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    def outputs(blocks: Sequence[tuple[int, int]]) -> list[Tensor]:
        fill = torch.empty if device.type == "cpu" else torch.randn  # on the CPU nobody looks at the values
        return [
            fill(batch, c, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            for c, side in blocks
        ]

    def provider(op: Op, blocks: Sequence[tuple[int, int]], grad: bool) -> Provider:
        def make() -> Callable[[], object]:
            student, teacher = outputs(blocks), outputs(blocks)
            if not grad:
                return lambda: op(student, teacher, WEIGHT)
            for s in student:
                s.requires_grad_()
            return lambda: torch.autograd.grad(op(student, teacher, WEIGHT)[0], student)

        return make

    def case(name: str, blocks: Sequence[tuple[int, int]], grad: bool) -> Case:
        meta = [torch.empty(batch, c, side, side, device="meta", dtype=dtype) for c, side in blocks]
        fused = compiled(lambda: provider(torch.compile(feature_kd_ref, dynamic=False), blocks, grad)(), device)
        return Case(
            "feature_kd",
            f"{name} {'fwd+bwd' if grad else 'fwd'}",
            {
                "triton": provider(feature_kd, blocks, grad),
                "torch": provider(feature_kd_ref, blocks, grad),
                "compile": fused,
            },
            bytes=feature_kd_bytes(meta, meta, grad),
            numel=sum(s.numel() for s in meta),
        )

    sizes = {f"nine blocks b{batch}": BLOCKS, f"seven blocks b{batch} xl": XL}
    return [case(name, blocks, grad) for name, blocks in sizes.items() for grad in (False, True)]
