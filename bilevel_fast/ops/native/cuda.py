"""The door to `ops.native._cuda` (`csrc/cuda.hpp`), which is there if it was built where there is a CUDA compiler.

Calls go to the current stream of the tensors' device. They do not wait for it, and can be captured into CUDA graphs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.ops.native.adamw_ema import AdamW, Trained
from bilevel_fast.ops.native.feature_kd import coefficients
from bilevel_fast.ops.native.pointers import check_dense, flat_pointers

try:
    from bilevel_fast.ops.native import _cuda
except ImportError as error:
    _cuda, _missing = None, error
else:
    _missing = None

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def is_built() -> bool:
    """Whether the functions below can be called."""
    return _cuda is not None


def feature_kd(student: Sequence[Tensor], teacher: Sequence[Tensor], weight: float) -> tuple[Tensor, list[Tensor]]:
    """As `bilevel_fast.ops.native.feature_kd`, on CUDA tensors, all fp32, all fp16 or all bf16.

    Differences and sums are fp32 whatever the tensors are; so are the losses. Gradients have the tensors' dtype.
    """
    module = _module()
    check_dense("student", student)
    device, dtype = _device("student", student[0]), student[0].dtype
    if dtype not in DTYPES:
        raise ValueError(f"student 0: {dtype}, expected one of {', '.join(DTYPES.values())}")
    students = flat_pointers("student", student, "student", student, dtype, device)
    teachers = flat_pointers("teacher", teacher, "student", student, dtype, device)
    counts, gradients = [s.numel() for s in student], [torch.empty_like(s) for s in student]
    losses = torch.empty(len(student), device=device)
    workspace = torch.empty(module.feature_kd_workspace(counts), dtype=torch.uint8, device=device)
    module.feature_kd(
        losses.data_ptr(),
        flat_pointers("gradient", gradients, "student", student, dtype, device),
        *(students, teachers, counts, coefficients(student, weight), DTYPES[dtype], workspace.data_ptr()),
        *_queue(device),
    )
    return losses, gradients


def adamw_ema(
    settings: AdamW,
    trained: Trained,
    gradients: Sequence[Tensor],
    lr: Tensor,
    number: Tensor,
    clip: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """As `AdamW.step`, on CUDA tensors, with everything that changes from step to step on the device.

    Args:
        settings: What does not change.
        lr, number, clip, skip: () fp32. The step's number is 1 for the first; without `clip` gradients are taken as
            they are, and nothing is written where `skip` is not 0.

    Raises:
        ValueError: A tensor is not as stated here and in `Trained`.
    """
    module = _module()
    check_dense("parameter", trained.parameters)
    device = _device("parameter", trained.parameters[0])
    parameters, exp_avgs, exp_avg_sqs, emas, copies = trained.pointers(device)
    pointers = flat_pointers("gradient", gradients, "parameter", trained.parameters, torch.float32, device)
    scalars = (("lr", lr), ("number", number), ("clip", clip), ("skip", skip))
    module.adamw_ema(
        *(parameters, pointers, exp_avgs, exp_avg_sqs, emas, copies, trained.counts),
        *(settings.beta1, settings.beta2, settings.eps, settings.weight_decay, settings.ema_decay),
        *(0 if t is None else _scalar(name, t, device) for name, t in scalars),
        *_queue(device),
    )


def _module() -> Any:
    if _cuda is None:
        raise ImportError(
            "bilevel_fast.ops.native._cuda is not built; with nvcc on the PATH, or CUDA_HOME set, run: pip install -e ."
        ) from _missing
    return _cuda


def _queue(device: torch.device) -> tuple[int, int]:
    return device.index, torch.cuda.current_stream(device).cuda_stream


def _device(name: str, tensor: Tensor) -> torch.device:
    if tensor.device.type != "cuda":
        raise ValueError(f"{name} 0: {tensor.device} tensor, expected cuda")
    return tensor.device


def _scalar(name: str, tensor: Tensor, device: torch.device) -> int:
    if (tensor.numel(), tensor.dtype, tensor.device) != (1, torch.float32, device):
        raise ValueError(
            f"{name}: {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, expected () fp32 on {device}"
        )
    return tensor.data_ptr()
