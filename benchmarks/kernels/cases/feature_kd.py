"""Feature distillation over the nine block outputs of SD 2.1 at 512 px.

Backward alone is no case: the gradient is written in the forward pass, and a graph runs backward once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case, Provider, compiled
from bilevel_kernels.feature_kd import feature_kd, feature_kd_bytes, feature_kd_ref

# after the down- and upsamplers: down_blocks.0-3, mid_block, up_blocks.0-3; pruning leaves them alone
BLOCKS = [(320, 32), (640, 16), (1280, 8), (1280, 8), (1280, 8), (1280, 16), (1280, 32), (640, 64), (320, 64)]
WEIGHT = 0.1

Op = Callable[[list[Tensor], list[Tensor], float], tuple[Tensor, Tensor]]


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    def outputs(fill: Callable[..., Tensor]) -> list[Tensor]:
        return [
            fill(batch, c, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            for c, side in BLOCKS
        ]

    def provider(op: Op, grad: bool) -> Provider:
        def make() -> Callable[[], object]:
            fill = torch.empty if device.type == "cpu" else torch.randn  # on the CPU nobody looks at the values
            student, teacher = outputs(fill), outputs(fill)
            if not grad:
                return lambda: op(student, teacher, WEIGHT)
            for s in student:
                s.requires_grad_()
            return lambda: torch.autograd.grad(op(student, teacher, WEIGHT)[0], student)

        return make

    meta = [torch.empty(batch, c, side, side, device="meta", dtype=dtype) for c, side in BLOCKS]
    return [
        Case(
            "feature_kd",
            f"nine blocks b{batch} {name}",
            {
                "triton": provider(feature_kd, grad),
                "torch": provider(feature_kd_ref, grad),
                "compile": compiled(
                    lambda grad=grad: provider(torch.compile(feature_kd_ref, dynamic=False), grad)(), device
                ),
            },
            bytes=feature_kd_bytes(meta, meta, grad),
            numel=sum(s.numel() for s in meta),
        )
        for name, grad in (("fwd", False), ("fwd+bwd", True))
    ]
