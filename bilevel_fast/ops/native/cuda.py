"""Calls of `ops.native._cuda` (`csrc/cuda.hpp`), which is there if it was built where there is a CUDA compiler.

Calls go to the current stream of the tensors' device. They do not wait for it, and can be captured into CUDA graphs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.ops.native.adamw_ema import AdamW, Trained
from bilevel_fast.ops.native.pointers import check_dense, flat_pointers

try:
    from bilevel_fast.ops.native import _cuda
except ImportError as error:
    _cuda, _missing = None, error
else:
    _missing = None


def is_built() -> bool:
    """Whether `adamw_ema` can be called."""
    return _cuda is not None


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
