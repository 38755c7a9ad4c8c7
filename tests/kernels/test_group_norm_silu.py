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
    group_norm_silu_of_two,
    group_norm_silu_ref,
    group_norm_silu_two_bwd,
    group_norm_silu_two_fwd,
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


@pytest.fixture
def in_parts(monkeypatch):
    """Backward of a group of `ODD` takes 4 of its 15 pixels at a time."""
    monkeypatch.setattr(op, "PART", 32)


@pytest.mark.usefixtures("in_parts")
def test_a_large_tile_is_gone_through_in_parts(gn):
    check_skip(group_norm_silu_and_input, ODD, make(gn, ODD), "part of a concatenation")


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("dweight += tl.sum(", "dweight = tl.sum("),
        ("dbias += tl.sum(", "dbias = tl.sum("),
        ("dtime += tl.sum(tl", "dtime = tl.sum(tl"),
        ("(0, TILE, PART):\n        # again", "(0, TILE - PART, PART):\n        # again"),
    ],
)
def test_planted_bug_of_parts_is_found(old, new, gn, tmp_path, monkeypatch):
    monkeypatch.setattr(op, "kernels", mutated(group_norm_kernels.__file__, old, new, tmp_path))
    with pytest.raises(AssertionError, match=r"error .*, eager has|non-finite elements"):
        check(group_norm_silu, ODD, make(gn, ODD))


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


TWO = [  # of TILED without padding and time, and how many channels are in the first tensor
    (TILED[2], 64),  # whole blocks of channels
    ((2, 3, 50, 18, 15, 0), 37),  # the border cuts a block and a group
]
NAMES_OF_TWO = ("out", "dx", "dmore", "dweight", "dbias")


def run_two(norm, tensors, leave, silu=True):
    """out and gradients where both inputs are used again behind the norm, but for those that `leave` names."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    x, more, weight, bias = leaves
    out, sources = norm(x, more, weight, bias, silu)
    given = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    around = given.flip(0).to(memory_format=torch.channels_last)
    used, start = out.mul(given).sum(), 0
    for number, source in enumerate(sources):
        if number not in leave:
            used = used + source.mul(around[:, start : start + source.shape[1]]).sum()
        start += source.shape[1]
    return [out.detach(), *torch.autograd.grad(used, leaves)]


def two_ref(groups):
    def fn(x, more, weight, bias, silu):
        return group_norm_silu_ref(torch.cat([x, more], 1), weight, bias, groups, EPS, silu=silu), (x, more)

    return fn


def of_two(groups):
    return lambda x, more, weight, bias, silu: group_norm_silu_of_two(x, more, weight, bias, groups, EPS, silu=silu)


def make_two(gn, shape, split, dtype=F32):
    x, weight, bias, _ = make(gn, shape, dtype, time=False)
    parts = (part.contiguous(memory_format=torch.channels_last) for part in (x[:, :split], x[:, split:]))
    return [*parts, weight, bias]


def check_two(shape, tensors, leave=(), silu=True):
    ref = two_ref(shape[1])
    nchw = [t.contiguous() for t in tensors]
    gold, eager = run_two(ref, [t.double() for t in nchw], leave, silu), run_two(ref, nchw, leave, silu)
    found = run_two(of_two(shape[1]), tensors, leave, silu)
    for name, f, e, g in zip(NAMES_OF_TWO, found, eager, gold, strict=True):
        assert_no_worse_than_eager(name, f, e, g)
    return found


@pytest.mark.parametrize(("shape", "split", "dtype"), [(*TWO[0], F32), (*TWO[1], F32), (*TWO[1], BF16)], ids=ids)
def test_an_input_in_two_tensors(shape, split, dtype, gn):
    tensors = make_two(gn, shape, split, dtype)
    out, dx, dmore, *_ = check_two(shape, tensors)
    assert (dx.shape, dmore.shape) == (tensors[0].shape, tensors[1].shape)
    whole = torch.cat(tensors[:2], 1).contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, group_norm_silu(whole, *tensors[2:], shape[1], EPS)), "bits of the joined input"


@pytest.mark.parametrize("leave", [(0,), (1,), (0, 1)], ids=str)
def test_two_tensors_of_which_one_or_none_is_used_again(leave, gn):
    check_two(TWO[1][0], make_two(gn, *TWO[1]), leave, silu=False)


def test_two_tensors_of_small_groups_are_joined(gn):
    tensors = make_two(gn, SMALL[1], 80)
    assert [t.shape[1] for t in of_two(SMALL[1][1])(*tensors, True)[1]] == [200]
    check_two(SMALL[1], tensors)


def test_gradients_that_lie_side_by_side_are_not_copied():
    like = [torch.empty(2, c, 3, 4).to(memory_format=torch.channels_last) for c in (5, 6)]
    whole = torch.randn(2, 11, 3, 4).to(memory_format=torch.channels_last)
    joined = op._joined(whole.split([5, 6], 1), like)
    assert torch.equal(joined, whole)
    assert joined.data_ptr() == whole.data_ptr()
    first, second = whole.split([5, 6], 1)
    for parts in ((first, second.clone()), (first.contiguous(), second), (whole[:, 6:], whole[:, :6])):
        assert torch.equal(op._joined(parts, like), torch.cat(parts, 1))
    assert torch.equal(op._joined((None, second), like)[:, 5:], second)
    assert op._joined((None, None), like) is None


def test_two_tensors_are_well_formed_custom_ops(gn):
    x, more, weight, bias = make_two(gn, *TWO[1])
    checks = ("test_schema", "test_faketensor")  # autograd is around them, not in them
    settings = (TWO[1][0][1], EPS, True)
    out, mean, rstd = group_norm_silu_two_fwd(x, more, weight, bias, *settings)
    torch.library.opcheck(group_norm_silu_two_fwd, (x, more, weight, bias, *settings), test_utils=checks)
    saved = (torch.ones_like(out), x, more, weight, bias, mean, rstd, True)
    torch.library.opcheck(group_norm_silu_two_bwd, (*saved, None), test_utils=checks)
    torch.library.opcheck(group_norm_silu_two_bwd, (*saved, torch.ones_like(out)), test_utils=checks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": lambda t: t[:1]}, r"more: shape \(1, 113, 18, 15\), expected that of x, \(2, 37, 18, 15\), but for"),
        ({"more": lambda t: t.half()}, "more: torch.float16 on .*, x is torch.float32 on"),
        ({"more": lambda t: t.contiguous()}, "more: strides .* are not channels_last"),
        ({"x": lambda t: t.double(), "more": lambda t: t.double()}, "x: torch.float64, expected"),
        ({"weight": lambda t: t[1:]}, r"weight: shape \(149,\), expected \(150,\)"),
        ({"groups": lambda _: 7}, "groups: 7 do not divide 150 channels"),
    ],
)
def test_refuses_two(change, message, gn):
    given = dict(zip(("x", "more", "weight", "bias"), make_two(gn, *TWO[1]), strict=True)) | {"groups": 3}
    given |= {name: f(given[name]) for name, f in change.items()}
    with pytest.raises(ValueError, match=message):
        group_norm_silu_of_two(**given, eps=EPS)


TWO_MUTANTS = [
    ("x_at = x_ptr + first * SPLIT + pixel", "x_at = x_ptr + pixel"),
    ("more_at = more_ptr + first * (ROW - SPLIT)", "more_at = more_ptr"),
    ("x.to(tl.float32) + more.to(tl.float32)", "x.to(tl.float32)"),
    ("_store(x_ptr + first * SPLIT, tile", "_store(x_ptr, tile"),
    ("tl.store(at, tile.to(more_ptr", "tl.store(at, 0.0 * tile.to(more_ptr"),
]


@pytest.mark.parametrize(("old", "new"), TWO_MUTANTS)
def test_planted_bug_of_two_tensors_is_found(old, new, gn, tmp_path, monkeypatch):
    monkeypatch.setattr(op, "kernels", mutated(group_norm_kernels.__file__, old, new, tmp_path))
    with pytest.raises(AssertionError, match=r"error .*, eager has|non-finite elements"):
        check_two(TWO[1][0], make_two(gn, *TWO[1]))


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
    (PADDED, "_store_input(dx_ptr, dmore_ptr, dx, first, pixel, channel, pixels, ROW, SPLIT)", "pass"),
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
    (PADDED, "dskip_ptr += first * skip_row", "dskip_ptr += first * ROW"),
]


@pytest.mark.parametrize(("shape", "old", "new"), SKIP_MUTANTS)
def test_planted_bug_of_the_input_used_again_is_found(shape, old, new, gn, tmp_path, monkeypatch):
    monkeypatch.setattr(op, "kernels", mutated(group_norm_kernels.__file__, old, new, tmp_path))
    with pytest.raises(AssertionError, match=r"error .*, eager has|non-finite elements"):
        check_skip(group_norm_silu_and_input, shape, make(gn, shape), "part of a concatenation")


def test_the_copy_without_a_bug_passes(gn, tmp_path, monkeypatch):
    monkeypatch.setattr(op, "kernels", mutated(group_norm_kernels.__file__, "dy *= s", "dy *= s", tmp_path))
    check(group_norm_silu, ODD, make(gn, ODD))
