"""Addresses of tensors, handed out after the checks that native code relies on."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pointer(tensor: Tensor, dtype: torch.dtype, numel: int) -> int:
    """Address of a CPU tensor that `_C` may read or write as `numel` consecutive elements of `dtype`."""
    assert tensor.device.type == "cpu", f"{tensor.device} tensor handed to native code"
    assert tensor.dtype == dtype, f"{tensor.dtype} tensor where native code takes {dtype}"
    assert tensor.is_contiguous(), f"shape {tuple(tensor.shape)} with strides {tensor.stride()} is not contiguous"
    assert tensor.numel() == numel, f"{tensor.numel()} elements where native code takes {numel}"
    return tensor.data_ptr()


def flat_pointers(
    name: str,
    tensors: Sequence[Tensor],
    like_name: str,
    like: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> list[int]:
    """Addresses of dense tensors, each of the shape and the memory order of its partner in `like`.

    Raises:
        ValueError: One is not; the message names it.
    """
    if len(tensors) != len(like):
        raise ValueError(f"{len(tensors)} tensors of {name}, {len(like)} of {like_name}")
    for i, (t, other) in enumerate(zip(tensors, like, strict=True)):
        if t.dtype != dtype or t.device != device:
            raise ValueError(f"{name} {i}: {t.dtype} on {t.device}, expected {dtype} on {device}")
        if t.shape != other.shape:
            raise ValueError(f"{name} {i} {tuple(t.shape)} and {like_name} {i} {tuple(other.shape)} differ in shape")
        if t.stride() != other.stride() and _order(t) != _order(other):
            raise ValueError(
                f"{name} {i} and {like_name} {i} differ in memory order: strides {t.stride()} and {other.stride()} "
                f"of shape {tuple(t.shape)}"
            )
    return [t.data_ptr() for t in tensors]


def check_dense(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError unless each has elements, and they fill one stretch of memory in whatever order."""
    if not tensors:
        raise ValueError(f"{name}: no tensors")
    for i, t in enumerate(tensors):
        if t.numel() == 0:
            raise ValueError(f"{name} {i}: no elements in {tuple(t.shape)}")
        if not (t.is_contiguous() or _fills_memory(t)):
            raise ValueError(f"{name} {i}: strides {t.stride()} of shape {tuple(t.shape)} are not dense")


def check_apart(pointers: Sequence[Sequence[int]]) -> None:
    """Raise ValueError if two of these tensors, all of which are written, start at the same address."""
    if len({p for several in pointers for p in several}) != sum(map(len, pointers)):
        raise ValueError("two of the tensors to be written are the same memory")


def _order(t: Tensor) -> tuple[int, ...]:
    """Strides that matter: of a dimension of one element the stride is never used."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(t.shape, t.stride(), strict=True))


def _fills_memory(t: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True
