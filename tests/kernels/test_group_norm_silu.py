"""The Triton kernels of GroupNorm with SiLU: the contract, and what only these have."""

import importlib

import pytest
import torch

from bilevel_kernels import group_norm_kernels
from bilevel_kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_and_input,
    group_norm_silu_bwd,
    group_norm_silu_fwd,
    group_norm_silu_ref,
)
from group_norm_contract import (
    BF16,
    EPS,
    F16,
    F32,
    NAMES,
    ODD,
    PADDED,
    SMALL,
    TILED,
    GroupNormContract,
    Norm,
    check,
    ids,
    make,
    run,
    same,
)
from mutants import mutated
from numerics import assert_no_worse_than_eager

op = importlib.import_module("bilevel_kernels.group_norm_silu")  # the package's attribute of this name is the function


@pytest.fixture
def gn(device):
    return Norm(group_norm_silu, (F32, F16, BF16), device)


class TestContract(GroupNormContract):
    pass


@pytest.mark.parametrize("dtype", [F32, BF16], ids=ids)
@pytest.mark.parametrize("shape", SMALL + TILED, ids=ids)
def test_small_groups_are_one_tile(shape, dtype, gn):
    assert (op._small_config(make(gn, shape, dtype)[0], shape[-1], shape[1]) is not None) == (shape in SMALL)


def test_more_tiles_than_are_added_at_a_time(gn):
    shape = (1, 2, 2, 65, 65, 4)
    check(group_norm_silu, shape, make(gn, shape))


@pytest.mark.parametrize("shape", [ODD, PADDED], ids=ids)
def test_affine_parameters_may_be_fp32(shape, gn):
    _, _, dweight, dbias, _ = check(group_norm_silu, shape, make(gn, shape, BF16, affine=F32))
    assert dweight.dtype == dbias.dtype == F32


@pytest.mark.parametrize(("shape", "time"), [(ODD, False), (PADDED, True)], ids=ids)
def test_is_a_well_formed_custom_op(shape, time, gn):
    x, weight, bias, time = make(gn, shape, time=time)
    settings = (shape[1], EPS, shape[-1], True)
    out, mean, rstd = group_norm_silu_fwd(x, weight, bias, time, *settings)
    saved = (x, weight, bias, time, mean, rstd, shape[1], shape[-1], True)
    torch.library.opcheck(group_norm_silu_bwd, (torch.ones_like(out), *saved))
    torch.library.opcheck(group_norm_silu_bwd, (torch.ones_like(out), *saved, torch.ones_like(out)))
    leaves = [None if t is None else t.requires_grad_() for t in (x, weight, bias, time)]
    torch.library.opcheck(group_norm_silu_fwd, (*leaves, *settings))


LAYOUTS = {  # of the gradient that comes to x another way
    "channels_last": lambda t: t,
    "part of a concatenation": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "NCHW": torch.Tensor.contiguous,
    "expanded": lambda t: t[:, :1].expand_as(t),
}


def around(x, layout):
    """Upstream of the second use of x: not 1, and nowhere the same."""
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(
        x.device, memory_format=torch.channels_last
    )
    return LAYOUTS[layout](other)


def with_skip(norm, layout, **mutant):
    """A norm with the signature of the reference, whose x is used again behind it; `run` sees the sum of both uses."""

    def fn(x, *others, **kwargs):
        out, again = norm(x, *others, **kwargs)
        return _Both.apply(out, again, around(x, layout).to(x.dtype))

    return fn


class _Both(torch.autograd.Function):
    """The first; its backward gives the second a gradient of its own, in the layout that it has."""

    @staticmethod
    def forward(ctx, out, again, upstream):
        ctx.upstream = upstream
        return out.view_as(out)

    @staticmethod
    def backward(ctx, dout):
        return dout, ctx.upstream, None


def twice_ref(*args, **kwargs):
    return group_norm_silu_ref(*args, **kwargs), args[0]


def check_skip(norm, shape, tensors, layout="channels_last", silu=True):
    nchw = [t if i else t.contiguous() for i, t in enumerate(tensors)]
    ref = with_skip(twice_ref, layout)
    gold = run(ref, shape, [None if t is None else t.double() for t in nchw], silu)
    eager, found = run(ref, shape, nchw, silu), run(with_skip(norm, layout), shape, tensors, silu)
    for name, f, e, g in zip(NAMES[: len(gold)], found, eager, gold, strict=True):
        assert_no_worse_than_eager(name, f, e, g)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [ODD, PADDED], ids=ids)
def test_the_gradient_of_the_input_used_again_is_added(shape, layout, gn):
    tensors = make(gn, shape)
    check_skip(group_norm_silu_and_input, shape, tensors, layout)
    assert same(run(with_skip(group_norm_silu_and_input, layout), shape, tensors)[2:],
                run(group_norm_silu, shape, tensors)[2:])  # fmt: skip


@pytest.mark.parametrize("dtype", [F16, BF16], ids=ids)
@pytest.mark.parametrize("shape", [SMALL[1], PADDED], ids=ids)
def test_the_input_used_again_in_16_bits(shape, dtype, gn):
    check_skip(
        group_norm_silu_and_input, shape, make(gn, shape, dtype, time=False), "part of a concatenation", silu=False
    )


def test_the_input_comes_back_as_it_is(gn):
    x, weight, bias, _ = make(gn, ODD, time=False)
    x.requires_grad_()
    out, again = group_norm_silu_and_input(x, weight, bias, ODD[1], EPS)
    assert again.data_ptr() == x.data_ptr()
    assert again.stride() == x.stride()
    assert torch.equal(out, group_norm_silu(x, weight, bias, ODD[1], EPS))
    (alone,) = torch.autograd.grad(again, x, torch.ones_like(x), retain_graph=True)
    assert torch.equal(alone, torch.ones_like(x))
    (only,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(only, torch.autograd.grad(group_norm_silu(x, weight, bias, ODD[1], EPS).sum(), x)[0])


def test_copies_a_gradient_only_if_it_must():
    strides = op._pixel_stride
    x = torch.empty(2, 6, 4, 5).contiguous(memory_format=torch.channels_last)
    assert strides(x) == 6
    assert strides(torch.cat([x, x], 1)[:, 6:]) == 12
    assert strides(x[:, :, :2]) == strides(x[:, ::2]) == strides(x.contiguous()) == strides(x[:, :1].expand_as(x)) == 0
    assert strides(torch.empty(1, 6, 1, 1)) == 6


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
def test_refuses(change, message, gn):
    x, weight, bias, time = make(gn, (2, 2, 5, 3, 4, 2))
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
def test_planted_bug_is_found(shape, old, new, gn, tmp_path, monkeypatch):
    monkeypatch.setattr(op, "kernels", mutated(group_norm_kernels.__file__, old, new, tmp_path))
    with pytest.raises(AssertionError, match=r"error .*, eager has|non-finite elements"):
        check(group_norm_silu, shape, make(gn, shape))


SKIP_MUTANTS = [
    (ODD, "dx = _plus_skip(dx, dskip_ptr, skip_row, pixel, channel, HW, WIDTH)", "pass"),
    (ODD, "dskip_ptr += b * HW * skip_row + g * WIDTH", "dskip_ptr += b * HW * skip_row"),
    (ODD, "pixel[:, None] * row + channel", "pixel[:, None] * 21 + channel"),
    (PADDED, "dx = _plus_skip(dx, dskip_ptr, skip_row, pixel, channel, pixels, ROW)", "pass"),
    (PADDED, "dskip_ptr += (b * HW + k * TILE) * skip_row", "dskip_ptr += first"),
]


@pytest.mark.parametrize(("shape", "old", "new"), SKIP_MUTANTS)
def test_planted_bug_of_the_input_used_again_is_found(shape, old, new, gn, tmp_path, monkeypatch):
    monkeypatch.setattr(op, "kernels", mutated(group_norm_kernels.__file__, old, new, tmp_path))
    with pytest.raises(AssertionError, match=r"error .*, eager has|non-finite elements"):
        check_skip(group_norm_silu_and_input, shape, make(gn, shape), "part of a concatenation")


def test_the_copy_without_a_bug_passes(gn, tmp_path, monkeypatch):
    monkeypatch.setattr(op, "kernels", mutated(group_norm_kernels.__file__, "dy *= s", "dy *= s", tmp_path))
    check(group_norm_silu, ODD, make(gn, ODD))
