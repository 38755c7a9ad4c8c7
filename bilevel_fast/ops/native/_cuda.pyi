"""Kernels (csrc/*.cu). Tensors are addresses of device memory that the caller has checked, streams cudaStream_t."""

from collections.abc import Sequence

def adamw_ema(
    parameters: Sequence[int],
    gradients: Sequence[int],
    exp_avgs: Sequence[int],
    exp_avg_sqs: Sequence[int],
    emas: Sequence[int],
    copies: Sequence[int],
    counts: Sequence[int],
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
    lr: int,
    number: int,
    clip: int,
    skip: int,
    device: int,
    stream: int,
) -> None:
    """A step, in place, of tensors of counts[i] elements. All fp32 but the copies, which are bf16.

    emas and copies may be empty; clip and skip may be 0.
    """
