"""LayerNorm behind a residual connection: against fp64 next to eager, and what planted bugs it finds."""

from importlib import import_module

import pytest
import torch

from bilevel_kernels.layer_norm import (
    WIDEST,
    layer_norm,
    layer_norm_bwd,
    layer_norm_bytes,
    layer_norm_fwd,
    layer_norm_ref,
)
from mutants import mutated
from numerics import assert_no_worse_than_eager

MODULE = import_module("bilevel_kernels.layer_norm")  # the package's attribute of that name is the function
EPS = 1e-5
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("h", "y", "dx", "dweight", "dbias", "dr", "drbias")
SHAPES = [
    (1, 1),  # one element: its variance is 0
    (2, 3, 37),  # ragged
    (19, 320),  # more rows than a tile, and SD 2.1's first level
    (3, 5, 1280),  # its third
    (3, 2100),  # more warps
]
RAGGED = SHAPES[1]


def ids(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


def make(shape, dtype, device, *, r=True, rbias=True, affine=None, mean=0.0):
    """x, weight, bias, r, rbias; then the gradients of h and y."""
    row = shape[-1:]
    sizes = [(shape, 1.0), (row, 1.0), (row, 1.0), (shape, r), (row, rbias), (shape, 1.0), (shape, 1.0)]
    tensors = [torch.randn(size, device=device).to(dtype) if there else None for size, there in sizes]
    tensors[0] = tensors[0] + mean
    return [t if affine is None or i not in (1, 2, 4) or t is None else t.to(affine) for i, t in enumerate(tensors)]


def run(fn, tensors, use=("h", "y")):
    """The results and all gradients; backward of those in `use`."""
    *inputs, dh, dy = tensors
    x, weight, bias, r, rbias = (None if t is None else t.detach().requires_grad_() for t in inputs)
    h, y = fn(x, weight, bias, EPS, r=r, rbias=rbias)
    outs = {"h": (h, dh), "y": (y, dy)}
    torch.autograd.backward(*zip(*(outs[name] for name in use), strict=True))
    return [
        None if t is None else t.detach()
        for t in (h, y, *(None if t is None else t.grad for t in (x, weight, bias, r, rbias)))
    ]


def check(fn, tensors, **use):
    gold = run(layer_norm_ref, [None if t is None else t.double() for t in tensors], **use)
    eager, found = run(layer_norm_ref, tensors, **use), run(fn, tensors, **use)
    for name, k, e, g in zip(NAMES, found, eager, gold, strict=True):
        if g is None:
            assert k is None, name
        else:
            assert_no_worse_than_eager(name, k, e, g)
    return found


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_as_good_as_eager(shape, dtype, device):
    check(layer_norm, make(shape, dtype, device))


@pytest.mark.parametrize("r", [True, False], ids=["r", "no-r"])
@pytest.mark.parametrize("rbias", [True, False], ids=["rbias", "no-rbias"])
def test_what_is_added_may_be_missing(r, rbias, device):
    tensors = make(RAGGED, F32, device, r=r, rbias=rbias)
    check(layer_norm, tensors)
    x, weight, bias, r, rbias = tensors[:5]
    h = layer_norm(x, weight, bias, EPS, r=r, rbias=rbias)[0]
    assert (h.data_ptr() == x.data_ptr()) == (r is None and rbias is None)


@pytest.mark.parametrize("use", [("y",), ("h", "y")], ids="-".join)
def test_only_one_of_the_results_may_be_used(use, device):
    check(layer_norm, make(RAGGED, F32, device), use=use)


def test_only_the_sum_is_used(device):
    tensors = make(RAGGED, F32, device)
    _, _, dx, dweight, dbias, dr, drbias = run(layer_norm, tensors, ("h",))
    assert torch.equal(dx, tensors[5])
    assert torch.equal(dr, dx)
    assert not dweight.any()
    assert not dbias.any()
    torch.testing.assert_close(drbias, dx.sum((0, 1)))


def test_variance_of_shifted_rows(device):
    """E[x^2] - E[x]^2 would cancel."""
    check(layer_norm, make((19, 320), F32, device, mean=300.0))


def test_affine_parameters_may_be_fp32(device):
    found = check_mixed(make(RAGGED, BF16, device, affine=F32))
    assert [found[i].dtype for i in (0, 1, 2, 3, 4, 5, 6)] == [BF16, BF16, BF16, F32, F32, BF16, F32]


def check_mixed(tensors):
    gold = run(layer_norm_ref, [t.double() for t in tensors])
    eager, found = run(layer_norm_ref, tensors), run(layer_norm, tensors)
    for name, k, e, g in zip(NAMES, found, eager, gold, strict=True):
        assert_no_worse_than_eager(name, k, e, g)
    return found


@pytest.mark.parametrize("chunk", [16, 128])
def test_any_chunk(chunk, device, monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNKS", (chunk,))
    check(layer_norm, make((3, 50, 40), F32, device))


def test_more_chunks_than_are_added_at_a_time(device, monkeypatch):
    monkeypatch.setattr(MODULE, "BLOCK_K", 4)
    check(layer_norm, make((100, 24), F32, device))


def test_chunks_are_long_where_there_are_many_rows():
    assert [MODULE._chunk(rows) for rows in (16 * 4096, 16 * 1024, 16 * 64)] == [128, 32, 16]


def test_gradients_may_have_gaps(device):
    tensors = make(RAGGED, F32, device)
    wide = [torch.stack([t, t], dim=-1)[..., 0] for t in tensors[5:]]
    for found, expected in zip(run(layer_norm, [*tensors[:5], *wide]), run(layer_norm, tensors), strict=True):
        assert torch.equal(found, expected)


def test_same_bits_twice(device):
    tensors = make((70, 64), BF16, device)
    assert all(torch.equal(a, b) for a, b in zip(run(layer_norm, tensors), run(layer_norm, tensors), strict=True))


def test_is_a_well_formed_custom_op(device):
    x, weight, bias, r, rbias, dh, dy = make(RAGGED, F32, device)
    h, _, mean, rstd = layer_norm_fwd(x, r, rbias, weight, bias, EPS)
    torch.library.opcheck(layer_norm_bwd, (dy, dh, h, weight, bias, rbias, mean, rstd))
    torch.library.opcheck(layer_norm_bwd, (dy, None, h, weight, bias, None, mean, rstd))
    leaves = [t.requires_grad_() for t in (x, r, rbias, weight, bias)]
    torch.library.opcheck(layer_norm_fwd, (*leaves, EPS))
    torch.library.opcheck(layer_norm_fwd, (leaves[0], None, None, *leaves[3:], EPS))


def test_bytes():
    both, bias, none = {"r": True, "rbias": True}, {"r": False, "rbias": True}, {"r": False, "rbias": False}
    assert [layer_norm_bytes(10, 2, **added, backward=False) for added in (both, bias, none)] == [80, 60, 40]
    assert layer_norm_bytes(10, 2, **both, backward=True) == 80


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x[0, 0]}, r"x: shape \(37,\), expected \(\.\.\., C\)"),
        ({"x": lambda x: x[:0]}, "at least one element"),
        ({"x": lambda x: x.double()}, "x: torch.float64, expected float32, float16 or bfloat16"),
        ({"x": lambda x: x.new_empty(2, WIDEST + 1)}, f"x: {WIDEST + 1} channels, {WIDEST} at most"),
        ({"x": lambda x: x.transpose(0, 1)}, r"x: strides \(37, 111, 1\) of shape .* are not contiguous"),
        ({"r": lambda r: r[:1]}, r"r: shape \(1, 3, 37\), expected \(2, 3, 37\)"),
        ({"r": lambda r: r.half()}, "r: torch.float16, expected torch.float32$"),
        ({"weight": lambda t: t[1:]}, r"weight: shape \(36,\), expected \(37,\)"),
        ({"bias": lambda t: t.half()}, "bias: torch.float16, expected torch.float32 or float32"),
        ({"rbias": lambda t: t.to("meta")}, "rbias: on meta, x is on"),
        ({"rbias": lambda t: torch.stack([t, t], 1)[:, 0]}, r"rbias: strides \(2,\) of shape"),
    ],
)
def test_refuses(change, message, device):
    names = ("x", "weight", "bias", "r", "rbias")
    given = dict(zip(names, make(RAGGED, F32, device)[:5], strict=True))
    given |= {name: f(given[name]) for name, f in change.items()}
    with pytest.raises(ValueError, match=message):
        layer_norm(**given, eps=EPS)


def test_planted_bug_of_the_gradient_of_x_itself_is_found(tmp_path, device):
    bug = mutated(MODULE.__file__, "layer_norm_bwd(dy, dh, x,", "layer_norm_bwd(dy, None, x,", tmp_path)
    with pytest.raises(AssertionError):
        check(bug.layer_norm, make(RAGGED, F32, device, r=False, rbias=False))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("h += tl.load(r_ptr + at, mask=mask, other=0.0).to(tl.float32)", "pass"),
        ("h += _channels(rbias_ptr, channel, C)", "pass"),
        ("tl.where((channel < C)[None, :], h - mean[:, None], 0.0)", "h - mean[:, None]"),
        ("tl.sum(d * d, axis=1) / C + eps", "tl.sum(d * d, axis=1) / (C - 1) + eps"),
        ("+ _channels(bias_ptr, channel, C)", ""),
        ("dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)", "dy = tl.where(mask, 1.0, 0.0)"),
        ("dx += tl.load(dh_ptr + at, mask=mask, other=0.0).to(tl.float32)", "pass"),
        ("(wdy - c0[:, None] - xhat * c1[:, None]) * rstd", "(wdy - xhat * c1[:, None]) * rstd"),
        ("(wdy - c0[:, None] - xhat * c1[:, None]) * rstd", "(wdy - c0[:, None]) * rstd"),
        ("dweight += dy * xhat", "dweight = dy * xhat"),
        ("dbias += dy", "dbias += xhat"),
        ("drbias += dx", "drbias += dy"),
        ("row = pid * CHUNK + start", "row = pid * CHUNK"),
        ("partial_ptr += which * K * C", "pass"),
        ("return dx, dx if ctx.added else None", "return dx, dh if ctx.added else None"),
    ],
)
def test_planted_bug_is_found(old, new, tmp_path, device):
    bug = mutated(MODULE.__file__, old, new, tmp_path)
    with pytest.raises(AssertionError):
        check(bug.layer_norm, make((50, 260), F32, device))  # some tiles a chunk, the last one cut
