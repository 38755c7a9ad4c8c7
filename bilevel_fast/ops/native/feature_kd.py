"""Feature distillation of `csrc/feature_kd.hpp`: losses and gradients in one read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel_fast.ops.native import _C
from bilevel_fast.ops.native.pointers import check_dense, flat_pointers, pointer

CPU = torch.device("cpu")


def feature_kd(student: Sequence[Tensor], teacher: Sequence[Tensor], weight: float) -> tuple[Tensor, list[Tensor]]:
    """mean (s - t)^2 of every pair, and the gradient of `weight` times the mean of those over the pairs.

        loss_k = mean (s_k - t_k)^2        gradient_k = 2 weight / (K N_k) (s_k - t_k)

    Results are the same bits whatever torch.get_num_threads().

    Args:
        student: K fp32 tensors, dense in any memory order: channels_last, for one.
        teacher: Of the same shapes and memory orders.
        weight: Of the mean.

    Returns:
        Losses (K,), and K gradients laid out as `student`.

    Raises:
        ValueError: A tensor is not as stated.
    """
    check_dense("student", student)
    students = flat_pointers("student", student, "student", student, torch.float32, CPU)
    teachers = flat_pointers("teacher", teacher, "student", student, torch.float32, CPU)
    losses, gradients = torch.empty(len(student)), [torch.empty_like(s) for s in student]
    _C.feature_kd(
        pointer(losses, torch.float32, len(student)),
        flat_pointers("gradient", gradients, "student", student, torch.float32, CPU),
        *(students, teachers, [s.numel() for s in student]),
        [2.0 * weight / (len(student) * s.numel()) for s in student],
        torch.get_num_threads(),
    )
    return losses, gradients
