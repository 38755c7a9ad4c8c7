"""Random numbers as a pure function of (seed, stream, global sample index, element).

A sample gets the same numbers whatever batch, rank or run it appears in: a resumed run is the same run, and
what a teacher said about a sample can be cached. The generator is Philox4x32-10; `csrc/philox.hpp` has the
layout of the counter and the way from bits to numbers, which a Triton kernel can follow with `tl.philox`.

One stream serves one purpose: `uniform`, `normal` and `integers` of the same (seed, stream, index) are made
of the same bits. Results lie on the CPU.

    B  samples
"""

import math
from collections.abc import Callable, Sequence
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.ops.native import _C, pointer

MAX_ELEMENTS = 2**34  # a 32-bit counter of blocks of four words

Indices = Sequence[int] | NDArray[np.integer] | Tensor


class Stream(IntEnum):
    """What the numbers are for. The values are part of what makes a run repeatable: never renumber."""

    NOISE = 0
    TIMESTEP = 1
    POSTERIOR = 2
    CAPTION = 3
    VIEW = 4
    SHUFFLE = 5
    DROPOUT = 6
    INITIAL = 7
    BANK = 8
    WORLD = 9
    GATE = 10
    CROP = 11
    ATTACK = 12


def normal(seed: int, stream: Stream, indices: Indices, shape: tuple[int, ...]) -> Tensor:
    """Standard normals (B, *shape), fp32, one row per sample index."""
    return _fill(_C.philox_normal, torch.float32, seed, stream, indices, shape)


def uniform(seed: int, stream: Stream, indices: Indices, shape: tuple[int, ...] = ()) -> Tensor:
    """Numbers in [0, 1) with 24 bits: (B, *shape), fp32, one row per sample index."""
    return _fill(_C.philox_uniform, torch.float32, seed, stream, indices, shape)


def integers(seed: int, stream: Stream, indices: Indices, high: int) -> Tensor:
    """Integers uniform on [0, high): (B,), int64, one per sample index."""
    assert 0 < high < 2**63, f"high is {high}"
    samples = _samples(indices)
    out = torch.empty_like(samples)
    _C.philox_integers(out.data_ptr(), high, _checked(seed), stream, samples.data_ptr(), len(samples))
    return out


def permutation(seed: int, stream: Stream, epoch: int, n: int) -> NDArray[np.int64]:
    """A random order of range(n), another one in every epoch: (n,), int64.

    Sorts n 64-bit keys, drawn as the elements of sample `epoch`.
    """
    words = _fill(_C.philox_words, torch.uint32, seed, stream, [epoch], (2 * n,))
    return np.argsort(words.numpy().view(np.uint64)[0], kind="stable")


def _fill(
    native: Callable[[int, int, int, int, int, int], None],
    dtype: torch.dtype,
    seed: int,
    stream: Stream,
    indices: Indices,
    shape: tuple[int, ...],
) -> Tensor:
    samples = _samples(indices)
    elements = math.prod(shape)
    assert elements <= MAX_ELEMENTS, f"{elements} numbers per sample"
    out = torch.empty(len(samples), *shape, dtype=dtype)
    out_ptr, samples_ptr = pointer(out, dtype, len(samples) * elements), samples.data_ptr()
    native(out_ptr, elements, _checked(seed), stream, samples_ptr, len(samples))
    return out


def _samples(indices: Indices) -> Tensor:
    samples = torch.as_tensor(indices, dtype=torch.int64, device="cpu").contiguous()
    assert samples.ndim == 1, f"indices of shape {tuple(samples.shape)}"
    assert not len(samples) or int(samples.min()) >= 0, "a sample index is negative"
    return samples


def _checked(seed: int) -> int:
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}; it must be in [0, 2**64)")
    return seed
