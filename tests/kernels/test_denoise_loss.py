from importlib import import_module

import pytest
import torch

from bilevel_kernels.denoise_loss import denoise_loss, denoise_loss_fwd, denoise_loss_ref
from mutants import mutated
from numerics import assert_no_worse_than_eager

MODULE = import_module("bilevel_kernels.denoise_loss")  # the package's attribute of that name is the function
SHAPES = [(1, 1), (2, 4, 8, 8), (3, 4, 17, 23), (2, 4, 64, 64)]  # scalar, small, ragged over blocks, SD 2.1 at 512 px
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WEIGHTS = [(1.0, 2.0), (0.7, 0.0), (0.0, 1.5)]


def tensors(shape, dtype, device, constants=None):
    s, target, teacher = (torch.randn(shape, device=device) for _ in range(3))
    weight = torch.rand(shape[0], device=device) + 0.5
    return s.to(dtype), target.to(constants or dtype), teacher.to(constants or dtype), weight


def run(fn, s, *args, dtotal=0.3):
    s = s.detach().requires_grad_()
    total, terms = fn(s, *args)
    assert not terms.requires_grad
    total.backward(torch.full_like(total, dtotal))  # not 1: catches a backward that ignores it
    return total.detach(), terms, s.grad


def check(fn, inputs, weights=(1.0, 2.0), dtotal=0.3):
    gold = run(denoise_loss_ref, *(x.double() for x in inputs), *weights, dtotal=dtotal)
    eager = run(denoise_loss_ref, *inputs, *weights, dtotal=dtotal)
    kernel = run(fn, *inputs, *weights, dtotal=dtotal)
    for name, k, e, g in zip(("total", "terms", "ds"), kernel, eager, gold, strict=True):
        assert_no_worse_than_eager(name, k, e, g)
    return kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("weights", WEIGHTS, ids=["both", "diffusion", "output"])
def test_denoise_loss(shape, weights, dtype, device):
    check(denoise_loss, tensors(shape, dtype, device), weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_upstream_gradient_of_one(dtype, device):
    check(denoise_loss, tensors((2, 4, 8, 8), dtype, device), dtotal=1.0)


def test_constants_may_be_fp32(device):
    check(denoise_loss, tensors((3, 4, 5, 7), torch.bfloat16, device, torch.float32))


def test_more_block_sums_than_the_last_kernel_adds_at_a_time(device, monkeypatch):
    monkeypatch.setattr(MODULE, "BLOCK", 16)
    monkeypatch.setattr(MODULE, "BLOCK_SUM", 8)
    check(denoise_loss, tensors((3, 4, 5, 7), torch.float32, device))


def test_fp16_gradient_survives_until_the_loss_scale(device):
    """At SD 2.1's batch an unscaled gradient is a denormal: 2 / M is 8e-6, and differences are small at the end."""
    s, target, teacher, weight = tensors((16, 4, 64, 64), torch.float32, "cpu")
    inputs = [x.to(device=device, dtype=torch.float16) for x in (s, s + 0.01 * target, s + 0.01 * teacher)]
    scale = 2.0**14
    *_, gold = run(denoise_loss_ref, *(x.double() for x in inputs), weight.double().to(device), dtotal=scale)
    *_, ds = run(denoise_loss, *inputs, weight.to(device), dtotal=scale)
    assert ((ds.double() - gold).abs() <= 2e-3 * gold.abs() + 2.0**-24).all()


def test_a_missing_term_is_not_read_and_zero(device):
    s, target, teacher, weight = tensors((2, 4, 8, 8), torch.float32, device)
    nan = torch.full_like(s, float("nan"))
    for args in ((nan, teacher, weight, 0.0, 2.0), (None, teacher, None, 0.0, 2.0)):
        total, terms, _ = run(denoise_loss, s, *args)
        assert torch.equal(total, 2 * terms[1])
        assert terms[0] == 0
    for args in ((target, nan, weight, 3.0, 0.0), (target, None, weight, 3.0, 0.0)):
        total, terms, _ = run(denoise_loss, s, *args)
        assert torch.equal(total, 3 * terms[0])
        assert terms[1] == 0


def test_channels_last_is_the_same_loss(device):
    *maps, weight = tensors((3, 4, 17, 5), torch.float32, device)
    nhwc = [x.to(memory_format=torch.channels_last) for x in maps]
    *_, ds = check(denoise_loss, (*nhwc, weight))
    assert ds.is_contiguous(memory_format=torch.channels_last)


def test_a_second_backward_is_refused(device):
    s, *rest = tensors((2, 4, 8, 8), torch.float32, device)
    s.requires_grad_()
    for first in (1.0, 0.3):
        total, _ = denoise_loss(s, *rest)
        (ds,) = torch.autograd.grad(total, s, torch.full_like(total, first), retain_graph=True)
        kept = ds.clone()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(total, s)
        assert torch.equal(ds, kept)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_traced_graph_has_the_same_gradient(dynamic, device):
    inputs = tensors((2, 4, 8, 8), torch.float32, device)
    compiled = torch.compile(denoise_loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for dtotal in (1.0, 0.3):
        expected, found = run(denoise_loss, *inputs, dtotal=dtotal), run(compiled, *inputs, dtotal=dtotal)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_no_gradient_asked_for(device, monkeypatch):
    s, *rest = tensors((2, 4, 8, 8), torch.float32, device)
    expected, *_ = run(denoise_loss, s, *rest)
    monkeypatch.setattr(torch, "empty_like", None)  # nothing the size of s is made
    with torch.no_grad():
        total, _ = denoise_loss(s.requires_grad_(), *rest)
    assert not total.requires_grad
    assert torch.equal(total, expected)


def test_same_bits_twice(device):
    inputs = tensors((2, 4, 64, 64), torch.bfloat16, device)
    assert all(torch.equal(a, b) for a, b in zip(*(run(denoise_loss, *inputs) for _ in range(2)), strict=True))


def test_is_a_well_formed_custom_op(device):
    s, target, teacher, weight = tensors((2, 4, 8, 8), torch.float32, device)
    torch.library.opcheck(denoise_loss_fwd, (s, target, teacher, weight, 1.0, 2.0, True))
    torch.library.opcheck(denoise_loss_fwd, (s, None, teacher, None, 0.0, 2.0, False))
    nhwc = [x.to(memory_format=torch.channels_last) for x in (s, target, teacher)]
    torch.library.opcheck(denoise_loss_fwd, (*nhwc, weight, 1.0, 2.0, True))
    # with a gradient: all but the tracing of a graph that returns ds, which its own backward pass modifies;
    # the graph of `denoise_loss` does not return it, and is traced above
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        denoise_loss_fwd, (s.requires_grad_(), target, teacher, weight, 1.0, 2.0, True), test_utils=checks
    )


X, W = torch.zeros(2, 4, 6, 6), torch.zeros(2)
NHWC = X.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X, X, X, W, 0.0, 0.0), "w_diffusion, w_output: both are 0"),
        ((X[:0], X[:0], X[:0], W[:0]), r"student: shape \(0, 4, 6, 6\) is not \(B, ...\) with elements"),
        ((X, None, X, W), "target: missing, and its term has a weight"),
        ((X, X, None, W), "teacher: missing"),
        ((X, X, X, None), "weight: missing"),
        ((X, X[:1], X, W), r"target: shape \(1, 4, 6, 6\), student has \(2, 4, 6, 6\)"),
        ((X, X, X[:1], W), r"teacher: shape \(1, 4, 6, 6\), student has"),
        ((X, X, X, W[:1]), r"weight: shape \(1,\), strides \(1,\), expected \(2,\), \(1,\)"),
        ((X, X, X, torch.zeros(4)[::2]), r"weight: shape \(2,\), strides \(2,\), expected"),
        ((X.double(), X, X, W), "student: torch.float64 is none of"),
        ((X, X.double(), X, W), "target: torch.float64 is none of"),
        ((X, X, X, W.double()), "weight: torch.float64 is none of"),
        ((X, X, X.to("meta"), W), "teacher: on meta, student on cpu"),
        ((X, X, NHWC, W), r"nor all channels_last: student \(144, 36, 6, 1\), target .* teacher"),
        ((X[:, ::2], X[:, ::2], X[:, ::2], W), "neither all contiguous nor all channels_last"),
    ],
    ids=[
        "weights", "empty", "no-target", "no-teacher", "no-weight", "target-shape", "teacher-shape", "weight-shape",
        "weight-gaps", "dtype", "target-dtype", "weight-dtype", "device", "mixed-layouts", "gaps",
    ],
)  # fmt: skip
def test_refuses(args, message):
    with pytest.raises(ValueError, match=message):
        denoise_loss(*args)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scale_unless_one([ds], dtotal, 1.0 / _stored_times(ds))", "pass"),
        ("ds += (w_diffusion * weight) * r", "ds += w_diffusion * r"),
        ("ds += w_output * r", "ds = w_output * r"),
        ("weight = tl.load(weight_ptr + b)", "weight = tl.load(weight_ptr)"),
        ("mask = n < N", "mask = offs < M"),
        ("b = pid // blocks", "b = 0 * pid"),
        ("tl.store(partial_ptr + pid, diffusion)", "pass"),
        ("* (weight / M)", "* (weight / N)"),
        ("start += BLOCK", "start = blocks"),
    ],
    ids=["upstream", "sample-weight", "term", "sample", "mask", "index", "not-stored", "mean", "sums"],
)
def test_notices(old, new, tmp_path, device, monkeypatch):
    bug = mutated(MODULE.__file__, old, new, tmp_path)
    monkeypatch.setattr(bug, "BLOCK", 16)
    monkeypatch.setattr(bug, "BLOCK_SUM", 8)
    with pytest.raises(AssertionError):
        check(bug.denoise_loss, tensors((3, 4, 5, 7), torch.float32, device))
