import importlib

import pytest
import torch

from bilevel_kernels import group_norm_kernels
from bilevel_kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_bwd,
    group_norm_silu_fwd,
    group_norm_silu_ref,
)
from mutants import mutated
from numerics import assert_no_worse_than_eager

op = importlib.import_module("bilevel_kernels.group_norm_silu")  # the package's attribute of this name is the function

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("out", "dx", "dweight", "dbias", "dtime")

# batch, groups, group width, height, width, padding
SMALL = [  # a whole group in one tile
    (2, 1, 1, 1, 1, 0),  # one element a group: its variance is 0
    (2, 5, 40, 8, 8, 0),  # the lowest level, pruned to 5 groups
    (2, 3, 7, 5, 3, 0),  # odd everywhere
    (33, 1, 9, 2, 1, 0),  # more samples than the sum over them takes at a time
]
TILED = [
    (2, 3, 10, 9, 15, 2),  # a second tile of 7 pixels
    (2, 23, 10, 5, 13, 2),  # 230 channels stored as 232: less than a tile of pixels, blocks of channels cut groups
    (1, 7, 30, 23, 24, 0),  # 210 channels, unaligned; five tiles of pixels
    (2, 1, 200, 10, 13, 8),  # a group across four blocks of channels
]
ODD, PADDED = SMALL[2], TILED[0]  # one of each, quick to interpret


def ids(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def make(shape, device, dtype, *, affine=None, time=True, mean=0.0, std=1.0):
    batch, groups, width, *size, padding = shape
    channels = groups * width
    x = torch.randn(batch, channels + padding, *size, device=device) * std + mean
    weight, bias = (torch.randn(channels, device=device, dtype=affine or dtype) for _ in range(2))
    time = torch.randn(batch, channels + padding, device=device, dtype=dtype) if time else None
    return x.to(dtype, memory_format=torch.channels_last), weight, bias, time


def run(fn, shape, tensors, silu=True):
    """out and the gradients of those tensors that there are."""
    _, groups, *_, padding = shape
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    *first, time = leaves
    out = fn(*first, groups, EPS, time=time, padding=padding, silu=silu)
    # not 1, and nowhere the same: catches a backward that ignores or misplaces dout
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(dout.to(out))
    return [out.detach(), *(t.grad for t in leaves if t is not None)]


def check(shape, tensors, silu=True):
    x, *others = tensors
    # eager in NCHW: torch takes the variance of channels_last on the CPU from E[x^2] - E[x]^2, too easy to beat
    nchw = [x.contiguous(), *others]
    gold = run(group_norm_silu_ref, shape, [None if t is None else t.double() for t in nchw], silu)
    eager = run(group_norm_silu_ref, shape, nchw, silu)
    kernel = run(group_norm_silu, shape, tensors, silu)
    for name, k, e, g in zip(NAMES[: len(gold)], kernel, eager, gold, strict=True):
        assert_no_worse_than_eager(name, k, e, g)
    return kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", SMALL + TILED, ids=ids)
def test_group_norm_silu(shape, dtype, device):
    tensors = make(shape, device, dtype)
    assert (op._small_config(tensors[0], shape[-1], shape[1]) is not None) == (shape in SMALL)
    out, dx, _, _, dtime = check(shape, tensors)
    for t in (out, dx):
        assert t.dtype == dtype
        assert t.is_contiguous(memory_format=torch.channels_last)
    for t in (out, dx, dtime):
        assert not t[:, t.shape[1] - shape[-1] :].any(), "padding is not zero"


def test_more_tiles_than_are_added_at_a_time(device):
    shape = (1, 2, 2, 65, 65, 4)
    check(shape, make(shape, device, torch.float32))


@pytest.mark.parametrize("time", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [ODD, PADDED], ids=ids)
def test_without_silu_or_time(shape, silu, time, device):
    check(shape, make(shape, device, torch.float32, time=time), silu)


@pytest.mark.parametrize("shape", [ODD, PADDED], ids=ids)
def test_affine_parameters_may_be_fp32(shape, device):
    _, _, dweight, dbias, _ = check(shape, make(shape, device, torch.bfloat16, affine=torch.float32))
    assert dweight.dtype == dbias.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of lanes past the last pixel, never stored
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", [SMALL[1], TILED[3]], ids=ids)
def test_variance_of_shifted_inputs(shape, dtype, device):
    """E[x^2] - E[x]^2 would cancel."""
    mean, std = (100.0, 0.1) if dtype == torch.float32 else (-2.3, 0.5)
    check(shape, make(shape, device, dtype, time=False, mean=mean, std=std))


@pytest.mark.parametrize("shape", [ODD, PADDED], ids=ids)
def test_same_bits_twice(shape, device):
    tensors = make(shape, device, torch.bfloat16)
    for a, b in zip(run(group_norm_silu, shape, tensors), run(group_norm_silu, shape, tensors), strict=True):
        assert torch.equal(a, b)


def test_padding_may_hold_anything(device):
    x, *others = make(PADDED, device, torch.float32)
    clean = run(group_norm_silu, PADDED, (x, *others))
    with torch.no_grad():
        x[:, -PADDED[-1] :] = float("nan")
    for a, b in zip(run(group_norm_silu, PADDED, (x, *others)), clean, strict=True):
        assert torch.equal(a, b)


def test_gradient_of_any_layout(device):
    x, weight, bias, time = make(ODD, device, torch.float32)
    x.requires_grad_()
    out = group_norm_silu(x, weight, bias, ODD[1], EPS, time=time)
    dout = torch.randn(out.shape, device=device)
    (dx,) = torch.autograd.grad(out, x, dout.to(memory_format=torch.channels_last), retain_graph=True)
    assert torch.equal(torch.autograd.grad(out, x, dout)[0], dx)


@pytest.mark.parametrize(("shape", "time"), [(ODD, False), (PADDED, True)], ids=ids)
def test_is_a_well_formed_custom_op(shape, time, device):
    x, weight, bias, time = make(shape, device, torch.float32, time=time)
    settings = (shape[1], EPS, shape[-1], True)
    out, mean, rstd = group_norm_silu_fwd(x, weight, bias, time, *settings)
    saved = (x, weight, bias, time, mean, rstd, shape[1], shape[-1], True)
    torch.library.opcheck(group_norm_silu_bwd, (torch.ones_like(out), *saved))
    leaves = [None if t is None else t.requires_grad_() for t in (x, weight, bias, time)]
    torch.library.opcheck(group_norm_silu_fwd, (*leaves, *settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x[0]}, r"x: shape \(12, 3, 4\), expected \(B, C \+ padding, H, W\)"),
        ({"x": lambda x: x[:0]}, "at least one element"),
        ({"x": lambda x: x.contiguous()}, r"x: strides \(144, 12, 4, 1\) of shape .* are not channels_last"),
        ({"x": lambda x: x.double()}, "x: torch.float64, expected float32, float16 or bfloat16"),
        ({"groups": lambda _: 3}, "groups: 3 do not divide 10 channels"),
        ({"groups": lambda _: 0}, "groups: 0 do not divide"),
        ({"padding": lambda _: 12}, "padding: 12 of 12 channels"),
        ({"padding": lambda _: -1}, "padding: -1 of 12 channels"),
        ({"weight": lambda t: t[1:]}, r"weight: shape \(9,\), expected \(10,\)"),
        ({"bias": lambda t: t.half()}, "bias: torch.float16, expected torch.float32"),
        ({"time": lambda t: t[:, :10]}, r"time: shape \(2, 10\), expected \(2, 12\)"),
        ({"time": lambda t: t.t().contiguous().t()}, r"time: strides \(1, 2\) of shape .* are not contiguous"),
        ({"weight": lambda t: t.to("meta")}, "weight: on meta, x is on"),
    ],
)
def test_refuses(change, message, device):
    x, weight, bias, time = make((2, 2, 5, 3, 4, 2), device, torch.float32)
    given = {"x": x, "weight": weight, "bias": bias, "groups": 2, "time": time, "padding": 2}
    given |= {name: f(given[name]) for name, f in change.items()}
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**given, eps=EPS)


MUTANTS = [  # a shape, and a bug that its check must find
    # forward
    (ODD, "tile += _load_channels(time_ptr, channel, C)", "tile += 0.0"),
    (ODD, "tl.sum(d * d) / (HW * WIDTH) + eps", "tl.sum(d * d) / (HW * WIDTH - 1) + eps"),
    (PADDED, "tl.minimum(HW - k * TILE, TILE) * tile_mean", "TILE * tile_mean"),
    (PADDED, "m2 + tl.minimum(HW - k * TILE, TILE) * d * d", "m2"),
    (PADDED, "ptr + channel // WIDTH", "ptr + channel // (WIDTH + 1)"),
    (PADDED, "_silu(y, SILU), pixel, channel, pixels, ROW, ROW)", "_silu(y, SILU), pixel, channel, pixels, C, ROW)"),
    # backward
    (ODD, "dy = _load(dout_ptr, None, pixel", "dy = 1.0 + 0.0 * _load(dout_ptr, None, pixel"),  # ignores dout
    (ODD, "dy *= s * (1.0 + y * (1.0 - s))", "dy *= s"),
    (ODD, "dx = (dy * w - c0 - xhat * c1) * rstd", "dx = (dy * w - c0) * rstd"),
    (ODD, "tl.sum(dbias[None, :] * w) / (HW * WIDTH)", "tl.sum(dbias[None, :]) / (HW * WIDTH)"),
    (ODD, "tl.where((pixel < HW)[:, None], dx, 0.0)", "dx"),  # dtime counts pixels that there are not
    (ODD, "sample_dbias_ptr + first, B, ", "sample_dbias_ptr + first, B - 1, "),
    (PADDED, "C) - c0 - xhat * c1) * rstd", "C) - xhat * c1) * rstd"),
    (PADDED, "C) - c0 - xhat * c1) * rstd", "C) - c0 - xhat * c1)"),
    (PADDED, "tl.sum(dweight * w) / (HW * WIDTH)", "tl.sum(dweight * w) / HW"),
    (PADDED, "dbias * w - HW * c0 - xhat * c1", "dbias * w - HW * c0"),
    (PADDED, "xhat = tl.where((pixel < pixels)[:, None], xhat, 0.0)", "pass"),
    (PADDED, "tl.store(dy_xhat_ptr + at,", "tl.store(dy_xhat_ptr + at - k * C,"),  # a tile not stored
    (PADDED, "_store(dx_ptr + first, dx, pixel, channel, pixels, ROW, ROW)", "pass"),
]


@pytest.mark.parametrize(("shape", "old", "new"), MUTANTS)
def test_planted_bug_is_found(shape, old, new, device, tmp_path, monkeypatch):
    monkeypatch.setattr(op, "kernels", mutated(group_norm_kernels.__file__, old, new, tmp_path))
    with pytest.raises(AssertionError, match=r"error .*, eager has|non-finite elements"):
        check(shape, make(shape, device, torch.float32))


def test_the_copy_without_a_bug_passes(device, tmp_path, monkeypatch):
    monkeypatch.setattr(op, "kernels", mutated(group_norm_kernels.__file__, "dy *= s", "dy *= s", tmp_path))
    check(ODD, make(ODD, device, torch.float32))
