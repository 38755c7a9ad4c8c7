from importlib import import_module

import pytest
import torch

from bilevel_kernels.geglu import geglu, geglu_bwd, geglu_bytes, geglu_fwd, geglu_ref
from bilevel_kernels.kept import Kept
from mutants import mutated
from numerics import assert_no_worse_than_eager

MODULE = import_module("bilevel_kernels.geglu")  # the package's attribute of that name is the function
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    (1, 2),  # one channel
    (2, 3, 2 * 37),  # ragged
    (3, 19, 2 * 264),  # more than one chunk of rows and one block of channels
    (2, 9, 2 * 1280),  # SD 2.1's first level, a few tokens of it
]
EVERY_OTHER = tuple(range(0, 32, 2))
KEPT = {
    "w3": (96, Kept.same(32, (0, 1, 5, 31))),
    "w10": (320, Kept.same(32, EVERY_OTHER)),
    "w40": (1280, Kept.same(32, (3, 4, 30))),
    "w10-per-sample": (320, Kept.per_sample(32, [(0, 9), EVERY_OTHER, (0, 9), (31,)])),
}


def run(fn, x, bias, dy, **kept):
    x = x.detach().requires_grad_()
    bias = None if bias is None else bias.detach().requires_grad_()
    y = fn(x, bias, **kept)
    y.backward(dy.to(y.dtype))  # not of ones: catches a backward that ignores it
    return y.detach(), x.grad, *(() if bias is None else (bias.grad,))


def tensors(shape, dtype, device, bias=True):
    x, dy = torch.randn(shape, device=device) * 1.7, torch.randn(*shape[:-1], shape[-1] // 2, device=device)
    b = torch.randn(shape[-1], device=device) if bias else None
    return tuple(None if t is None else t.to(dtype) for t in (x, b, dy))


def check(fn, inputs, **kept):
    gold = run(geglu_ref, *(None if t is None else t.double() for t in inputs), **kept)
    eager, kernel = run(geglu_ref, *inputs, **kept), run(fn, *inputs, **kept)
    for name, k, e, g in zip(("y", "dx", "dbias"), kernel, eager, gold, strict=False):
        assert_no_worse_than_eager(name, k, e, g)
    return kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_geglu(shape, bias, dtype, device):
    check(geglu, tensors(shape, dtype, device, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("width", KEPT)
def test_dropped_groups_are_zero_and_not_read(width, dtype, device):
    channels, kept = KEPT[width]
    x, bias, dy = tensors((4, 11, 2 * channels), dtype, device)
    check(geglu, (x, bias, dy), kept=kept)
    dropped = ~kept.mask(channels // 32, 4, x.device)
    x.masked_fill_(dropped.repeat(1, 2)[:, None], float("nan"))
    bias.masked_fill_(dropped.all(0).repeat(2), float("nan"))
    dy.masked_fill_(dropped[:, None], float("nan"))
    y, dx, dbias = run(geglu, x, bias, dy, kept=kept)
    assert not any(t.isnan().any() for t in (y, dx, dbias))
    assert not y[dropped[:, None].expand_as(y)].any()
    assert not dx[dropped.repeat(1, 2)[:, None].expand_as(dx)].any()
    assert not dbias[dropped.all(0).repeat(2)].any()


def test_one_list_for_any_shape_and_all_groups_are_no_list(device):
    inputs = tensors((2, 3, 5, 64), torch.float32, device)
    check(geglu, inputs, kept=Kept.same(32, (1, 2, 30)))
    everything = run(geglu, *inputs, kept=Kept.same(32, range(32)))
    assert all(torch.equal(a, b) for a, b in zip(everything, run(geglu, *inputs), strict=True))


@pytest.mark.parametrize("chunk", [16, 128])
def test_any_chunk(chunk, device, monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNKS", (chunk,))
    kept = Kept.per_sample(8, [(0, 3), (1, 2, 7)])
    check(geglu, tensors((2, 150, 2 * 24), torch.float32, device))
    check(geglu, tensors((2, 150, 2 * 24), torch.float32, device), kept=kept)


def test_chunks_are_long_where_there_is_much_to_do():
    def chunk(B, T, width, kept=None):
        return MODULE._launch(B, T, width, kept)[1]["CHUNK"]

    assert chunk(1, 16 * 4096, 1280) == 128
    assert chunk(1, 16 * 256, 5120) == 32
    assert chunk(1, 2 * 64, 5120) == 16


@pytest.mark.filterwarnings("ignore:overflow")  # to infinity, whose exp2 is right
@pytest.mark.parametrize("g", [0.0, -1e-3, 5.0, 12.0, 100.0, 3e38], ids=str)
def test_far_gates(g, device):
    """Phi reaches 0 and 1, and stays there."""
    x = torch.tensor([[1.0, g], [1.0, -g]], device=device)
    y, dx = run(geglu, x, None, torch.ones(2, 1, device=device))
    gold, dgold = run(geglu_ref, x.double(), None, torch.ones(2, 1, device=device, dtype=torch.float64))
    torch.testing.assert_close(y.double(), gold, rtol=2e-7, atol=1e-7)
    torch.testing.assert_close(dx.double(), dgold, rtol=2e-7, atol=1e-7)


def test_the_cdf_is_as_close_as_erf_in_fp32(device):
    g = torch.linspace(-9, 9, 4001, device=device)
    x = torch.stack([torch.ones_like(g), g]).view(1, -1)  # y = g Phi(g)
    gold = g.double() * torch.special.ndtr(g.double())
    error = (geglu(x)[0].double() - gold).abs() / g.abs().clamp(min=1.0)
    eager = (geglu_ref(x)[0].double() - gold).abs() / g.abs().clamp(min=1.0)
    assert error.max() <= 1.5 * eager.max()


def test_bias_may_have_another_dtype(device):
    x, _, dy = tensors((2, 5, 64), torch.bfloat16, device)
    bias = torch.randn(64, device=device)
    y, dx, dbias = run(geglu, x, bias, dy)
    gold = run(geglu_ref, x.double(), bias.double(), dy.double())
    eager = run(geglu_ref, x, bias.bfloat16(), dy)
    assert (y.dtype, dx.dtype, dbias.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    for name, k, e, g in zip(("y", "dx", "dbias"), (y, dx, dbias), eager, gold, strict=True):
        assert_no_worse_than_eager(name, k, e, g)


def test_incoming_gradient_may_have_gaps(device):
    x, bias, dy = tensors((2, 5, 64), torch.float32, device)
    wide = torch.stack([dy, dy], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(run(geglu, x, bias, wide), run(geglu, x, bias, dy), strict=True))


def test_same_bits_twice(device):
    inputs = tensors((3, 70, 64), torch.bfloat16, device)
    assert all(torch.equal(a, b) for a, b in zip(run(geglu, *inputs), run(geglu, *inputs), strict=True))


def test_is_a_well_formed_custom_op(device):
    x, bias, dy = tensors((2, 5, 64), torch.float32, device)
    kept = Kept.per_sample(8, [(0, 3), (1,)]).mask(1, 2, x.device).to(torch.uint8)
    torch.library.opcheck(geglu_fwd, (x.requires_grad_(), bias.requires_grad_(), kept))
    torch.library.opcheck(geglu_fwd, (x, None, None))
    torch.library.opcheck(geglu_bwd, (dy, x.detach(), bias.detach(), kept))
    torch.library.opcheck(geglu_bwd, (dy, x.detach(), None, None))


def test_bytes():
    assert geglu_bytes(rows=10, width=8, kept=4, itemsize=2, backward=False) == 10 * (8 + 8) * 2
    assert geglu_bytes(rows=10, width=8, kept=4, itemsize=2, backward=True) == 10 * (12 + 16) * 2


X = torch.zeros(2, 3, 8)


@pytest.mark.parametrize(
    ("x", "bias", "kept", "message"),
    [
        (X[..., :7], None, None, r"x: shape \(2, 3, 7\) is not \(..., 2F\)"),
        (X[:0], None, None, r"x: shape \(0, 3, 8\) is not \(..., 2F\) with elements"),
        (X[0, 0], None, None, r"x: shape \(8,\) is not"),
        (X[..., ::2], None, None, r"x: strides \(24, 8, 2\) of shape \(2, 3, 4\) are not contiguous"),
        (X.double(), None, None, "x: torch.float64 is none of"),
        (X, torch.zeros(8, dtype=torch.int32), None, "bias: torch.int32 is none of"),
        (X, torch.zeros(4), None, r"bias: shape \(4,\), strides \(1,\), expected \(8,\), \(1,\)"),
        (X, torch.zeros(16)[::2], None, r"bias: shape \(8,\), strides \(2,\), expected"),
        (X, torch.zeros(8, device="meta"), None, "bias: on meta, x on cpu"),
        (X, None, Kept.same(3, (0,)), "kept: 3 units do not divide the 4 channels of half of x"),
        (X, None, Kept.per_sample(4, [(0,), (1,), (2,)]), "kept: lists for 3 samples, the batch has 2"),
        (X[0], None, Kept.per_sample(4, [(0,), (1,), (2,)]), r"kept: a list for each sample needs x \(B, T, 2F\)"),
    ],
    ids=[
        "odd", "empty", "one-axis", "gaps", "dtype", "bias-dtype", "bias-shape", "bias-gaps", "bias-device",
        "units", "samples", "no-samples",
    ],
)  # fmt: skip
def test_refuses(x, bias, kept, message):
    with pytest.raises(ValueError, match=message):
        geglu(x, bias, kept=kept)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("_C6 = tl.constexpr(-0.000186179542)", "_C6 = tl.constexpr(0.000186179542)"),
        ("tl.where(g > 0.0, 1.0 - upper, upper)", "1.0 - upper"),
        ("dg = dy * v * (cdf + g * pdf)", "dg = dy * v * cdf"),
        ("dv = dy * (g * cdf)", "dv = g * cdf"),
        ("tl.store(at + F, tl.sum(sum_g, axis=0), mask=ch < F)", "pass"),
        ("sum_v += dv", "sum_v = dv"),
        ("ch // (F // UNITS)", "ch // UNITS"),
        ("kept_ptr + b * UNITS", "kept_ptr"),
        ("tl.store(dx_ptr + at + F, dg", "tl.store(dx_ptr + at, dg"),
        ("row = b * T + t\n        v, g", "row = t\n        v, g"),
    ],
    ids=["coefficient", "tail", "density", "upstream", "not-stored", "one-row", "unit", "sample", "half", "row"],
)
def test_notices(old, new, tmp_path, device):
    bug = mutated(MODULE.__file__, old, new, tmp_path)
    kept = Kept.per_sample(8, [(0, 3), (1, 2, 7)])
    inputs = tensors((2, 19, 2 * 24), torch.float32, device)
    with pytest.raises(AssertionError):
        check(bug.geglu, inputs, kept=kept)
