"""What every GroupNorm with SiLU keeps to; a file of tests has the fixture `gn` and a subclass of the contract."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from bilevel_kernels.group_norm_silu import group_norm_silu_ref
from numerics import assert_no_worse_than_eager

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
EPS = 1e-5
NAMES = ("out", "dx", "dweight", "dbias", "dtime")

# batch, groups, group width, height, width, padding
SMALL = [  # a whole group in one tile of Triton
    (2, 1, 1, 1, 1, 0),  # one element a group: its variance is 0
    (2, 5, 40, 8, 8, 0),  # the lowest level, pruned to 5 groups
    (2, 3, 7, 5, 3, 0),  # odd everywhere
    (33, 1, 9, 2, 1, 0),  # more samples than the sum over them takes at a time
    (2, 8, 6, 8, 8, 0),  # whole vectors
    (2, 5, 1, 7, 5, 0),  # groups of one channel
    (1, 8, 3, 6, 5, 0),  # rows of one pixel are no whole vectors
    (1, 10, 30, 3, 3, 0),  # as wide as a row of one pixel
]
TILED = [
    (2, 3, 10, 9, 15, 2),  # a second tile of 7 pixels
    (2, 23, 10, 5, 13, 2),  # 230 channels stored as 232: less than a tile of pixels, blocks of channels cut groups
    (1, 7, 30, 23, 24, 0),  # 210 channels, unaligned; five tiles of pixels
    (2, 1, 200, 10, 13, 8),  # a group across four blocks of channels
    (1, 6, 3, 9, 9, 6),  # one sample
]
ODD, PADDED = SMALL[2], TILED[0]  # one of each, quick to interpret
ALL_DTYPES = (SMALL[1], ODD, PADDED)  # elsewhere 16 bits are other code on a GPU only


@dataclass(frozen=True)
class Norm:
    """An implementation with the signature of `group_norm_silu_ref`, and what it takes."""

    fn: Callable[..., torch.Tensor]
    dtypes: Sequence[torch.dtype] = (F32,)
    device: str = "cpu"


def ids(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def make(gn, shape, dtype=F32, *, affine=None, time=True, mean=0.0, std=1.0):
    batch, groups, width, *size, padding = shape
    channels = groups * width
    x = torch.randn(batch, channels + padding, *size, device=gn.device) * std + mean
    weight, bias = (torch.randn(channels, device=gn.device, dtype=affine or dtype) for _ in range(2))
    time = torch.randn(batch, channels + padding, device=gn.device, dtype=dtype) if time else None
    return x.to(dtype, memory_format=torch.channels_last), weight, bias, time


def run(fn, shape, tensors, silu=True, layout=torch.channels_last, dirty=False):
    """out and the gradients of those tensors that there are; `dirty` padding of dout holds NaN."""
    _, groups, *_, padding = shape
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    *first, time = leaves
    out = fn(*first, groups, EPS, time=time, padding=padding, silu=silu)
    # not 1, and nowhere the same: catches a backward that ignores or misplaces dout
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    if dirty:
        dout[:, out.shape[1] - padding :] = float("nan")
    out.backward(dout.contiguous(memory_format=layout))
    return [out.detach(), *(t.grad for t in leaves if t is not None)]


def check(fn, shape, tensors, silu=True):
    x, *others = tensors
    # eager in NCHW: torch takes the variance of channels_last on the CPU from E[x^2] - E[x]^2, too easy to beat
    nchw = [x.contiguous(), *others]
    gold = run(group_norm_silu_ref, shape, [None if t is None else t.double() for t in nchw], silu)
    eager = run(group_norm_silu_ref, shape, nchw, silu)
    found = run(fn, shape, tensors, silu)
    for name, f, e, g in zip(NAMES[: len(gold)], found, eager, gold, strict=True):
        assert_no_worse_than_eager(name, f, e, g)
    return found


def same(one, two) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class GroupNormContract:
    @pytest.mark.parametrize("shape", SMALL + TILED, ids=ids)
    def test_as_good_as_eager(self, shape, gn):
        for dtype in gn.dtypes if gn.device == "cuda" or shape in ALL_DTYPES else gn.dtypes[:1]:
            out, dx, _, _, dtime = check(gn.fn, shape, make(gn, shape, dtype))
            assert out.dtype == dx.dtype == dtype
            for t in (out, dx):
                assert t.is_contiguous(memory_format=torch.channels_last)
            for t in (out, dx, dtime):
                assert not t[:, t.shape[1] - shape[-1] :].any(), "padding is not zero"

    @pytest.mark.parametrize("time", [False, True])
    @pytest.mark.parametrize("silu", [False, True])
    @pytest.mark.parametrize("shape", [ODD, PADDED], ids=ids)
    def test_without_silu_or_time(self, shape, silu, time, gn):
        check(gn.fn, shape, make(gn, shape, time=time), silu)

    @pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of lanes past the last pixel, never stored
    @pytest.mark.parametrize("shape", [SMALL[1], PADDED], ids=ids)
    def test_variance_of_shifted_inputs(self, shape, gn):
        """E[x^2] - E[x]^2 would cancel."""
        for dtype in gn.dtypes:
            mean, std = (100.0, 0.1) if dtype == F32 else (-2.3, 0.5)
            check(gn.fn, shape, make(gn, shape, dtype, time=False, mean=mean, std=std))

    @pytest.mark.parametrize("shape", [ODD, PADDED], ids=ids)
    def test_same_bits_twice(self, shape, gn):
        tensors = make(gn, shape, gn.dtypes[-1])
        assert same(run(gn.fn, shape, tensors), run(gn.fn, shape, tensors))

    @pytest.mark.parametrize("silu", [False, True])
    def test_padding_may_hold_anything(self, silu, gn):
        x, *others = make(gn, PADDED)
        clean = run(gn.fn, PADDED, (x, *others), silu)
        x[:, -PADDED[-1] :] = float("nan")
        assert same(run(gn.fn, PADDED, (x, *others), silu, dirty=True), clean)

    def test_gradient_of_any_layout(self, gn):
        tensors = make(gn, ODD)
        nhwc, nchw = (run(gn.fn, ODD, tensors, layout=f) for f in (torch.channels_last, torch.contiguous_format))
        assert same(nhwc, nchw)
        x, *others, time = make(gn, ODD)
        out = gn.fn(x.requires_grad_(), *others, ODD[1], EPS, time=time, padding=0, silu=True)
        (expanded,) = torch.autograd.grad(out, x, torch.ones((), device=gn.device).expand_as(out), retain_graph=True)
        assert torch.equal(expanded, torch.autograd.grad(out, x, torch.ones_like(out))[0])

    def test_without_gradients(self, gn):
        *first, time = make(gn, ODD)
        with torch.no_grad():
            frozen = gn.fn(*(t.requires_grad_() for t in first), ODD[1], EPS, time=time, padding=0, silu=True)
        assert frozen.grad_fn is None
        assert torch.equal(frozen, gn.fn(*first, ODD[1], EPS, time=time, padding=0, silu=True).detach())
