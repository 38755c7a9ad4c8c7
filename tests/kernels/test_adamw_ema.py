import math
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bilevel_kernels.adamw_ema import BLOCK, adamw_ema, adamw_ema_, adamw_ema_bytes, adamw_ema_ref
from mutants import mutated
from numerics import assert_no_worse_than_eager

module = import_module("bilevel_kernels.adamw_ema")  # the package's attribute of that name may be the function

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# one; less than a block; a block exactly; blocks and a rest that 16 does not divide
SIZES = [1, 17, BLOCK, 2 * BLOCK + 5]
WRITTEN = ("p", "m", "v", "ema", "copy")


def scalar(value, device):
    return torch.tensor(value, device=device, dtype=F32)


def state(n, device, grad=F32, copy=BF16, step=3.0):
    """All tensors that a call takes."""
    s = {"p": torch.randn(n), "g": torch.randn(n), "m": torch.randn(n), "v": torch.rand(n), "ema": torch.randn(n)}
    s = {name: x.to(device) for name, x in s.items()}
    s["g"] = s["g"].to(grad)
    s["copy"] = torch.zeros(n, device=device, dtype=copy)
    return s | {name: scalar(x, device) for name, x in {"lr": 0.1, "step": step, "clip": 0.7, "skip": 0.0}.items()}


def run(fn, s, **settings):
    s = {name: x.clone() for name, x in s.items()}
    call(fn, s, **settings)
    return s


def call(fn, s, **settings):
    fn(*(s[name] for name in "pgmv"), **{name: x for name, x in s.items() if name not in "pgmv"}, **settings)


def compare(fn, s, **settings):
    settings = {"weight_decay": 0.2, "ema_decay": 0.9} | settings  # large, so that what is wrong is seen
    gold = run(adamw_ema_ref, {name: x.double() for name, x in s.items()}, **settings)
    eager = run(adamw_ema_ref, s, **settings)
    kernel = run(fn, s, **settings)
    for name in s:
        if name in WRITTEN:
            assert_no_worse_than_eager(name, kernel[name], eager[name], gold[name])
        else:
            assert torch.equal(kernel[name], s[name]), f"{name} was written"
    if "copy" in s and (s["copy"].is_cuda or s["copy"].dtype == F16):  # the interpreter cuts bf16 off
        assert torch.equal(kernel["copy"], kernel["p"].to(s["copy"].dtype)), "copy is not p, rounded"


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("grad", "copy"), [(F32, BF16), (BF16, BF16), (F16, F16)], ids=str)
def test_adamw_ema(n, grad, copy, device):
    compare(adamw_ema_, state(n, device, grad, copy))


@pytest.mark.parametrize("left_out", ["clip", "ema", "copy", "skip"])
def test_each_option_may_be_left_out(left_out, device):
    s = state(BLOCK + 5, device)
    del s[left_out]
    compare(adamw_ema_, s)


SETTINGS = [
    {"beta1": 0.0}, {"beta2": 0.0}, {"beta1": 0.5, "beta2": 0.9}, {"eps": 1.0},
    {"weight_decay": 0.0}, {"ema_decay": 0.0}, {"ema_decay": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings(settings, device):
    compare(adamw_ema_, state(17, device), **settings)


def test_ten_steps_are_those_of_torch(device):
    """With a warm-up, whose learning rates are representable in fp32, and weight decay."""
    n = BLOCK + 5
    start, grads = torch.randn(n, device=device), torch.randn(10, n, device=device)

    def torch_adamw(dtype, **how):
        p = start.to(dtype).requires_grad_()
        optimizer = torch.optim.AdamW([p], weight_decay=0.1, **how)
        for t, g in enumerate(grads):
            optimizer.param_groups[0]["lr"] = 2.0**-8 * (t + 1)
            p.grad = g.to(dtype)
            optimizer.step()
        return p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]

    p, m, v = start.clone(), torch.zeros(n, device=device), torch.zeros(n, device=device)
    lr, step = scalar(0.0, device), scalar(0.0, device)
    for g in grads:
        lr += 2.0**-8
        step += 1
        adamw_ema_(p, g, m, v, lr=lr, step=step, weight_decay=0.1)
    gold, fused = torch_adamw(torch.float64, foreach=False), torch_adamw(F32, fused=True)
    for name, k, e, o in zip("pmv", (p, m, v), fused, gold, strict=True):
        assert_no_worse_than_eager(name, k, e, o)
    ulp = torch.finfo(F32).eps * gold[0].abs().clamp(min=2.0**-8 * 55)  # or of the way it came
    assert ((p.double() - gold[0]).abs() <= 4 * ulp).all()


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 10, 100, 500, 700, 1_000, 10_000, 100_000, 10_000_000])
@pytest.mark.parametrize("beta", [0.5, 0.9, 0.999, 0.9999])
def test_bias_corrections(step, beta, device):
    """Moments and gradient of 1 stay 1: p moves by -1 / c1, and by -sqrt(c2)."""
    c = -math.expm1(step * math.log(beta))
    for settings, expected in (({"beta1": beta, "beta2": 0.0}, -1 / c), ({"beta1": 0.0, "beta2": beta}, -math.sqrt(c))):
        p, one = torch.zeros(1, device=device), scalar(1.0, device)
        g, m, v = (torch.ones(1, device=device) for _ in range(3))
        adamw_ema_(p, g, m, v, lr=one, step=scalar(float(step), device), eps=1e-30, **settings)
        assert p.item() == pytest.approx(expected, rel=5e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("skip", [1.0, -0.5, float("nan")])
def test_skip_leaves_every_bit(skip, bad, device):
    s = state(BLOCK + 5, device)
    for name in WRITTEN:  # any bits: NaNs with a payload among them
        s[name].view(torch.int32 if s[name].dtype == F32 else torch.int16).random_()
    s["g"].fill_(bad)
    s["skip"] = scalar(skip, device)
    after = run(adamw_ema_, s)
    for name in WRITTEN:
        bits = torch.int32 if s[name].dtype == F32 else torch.int16
        assert torch.equal(after[name].view(bits), s[name].view(bits)), name


def test_a_bad_gradient_without_skip_is_seen(device):
    s = state(17, device)
    s["g"][3] = float("nan")
    p = run(adamw_ema_, s)["p"]
    assert p[3].isnan()
    assert p.isfinite().sum() == 16


@pytest.mark.parametrize("n", [5, BLOCK - 1, BLOCK, BLOCK + 7])
def test_views_at_any_address_and_nothing_beyond_them(n, device):
    """Every buffer starts at another offset of its storage; what lies around it stays."""
    s = state(n, device)
    storage = {name: torch.full((n + 2 * BLOCK,), 7.0, device=device, dtype=s[name].dtype) for name in WRITTEN}
    inside = {name: slice(i, n + i) for i, name in enumerate(WRITTEN, start=1)}
    for name in WRITTEN:
        storage[name][inside[name]] = s[name]
    views = s | {name: storage[name][inside[name]] for name in WRITTEN}
    expected = run(adamw_ema_, s)
    call(adamw_ema_, views)
    for name in WRITTEN:
        assert torch.equal(storage[name][inside[name]], expected[name])
        storage[name][inside[name]] = 7.0
        assert (storage[name] == 7.0).all(), f"{name}: written outside"


def test_same_bits_twice(device):
    s = state(2 * BLOCK + 5, device)
    one, two = run(adamw_ema_, s), run(adamw_ema_, s)
    assert all(torch.equal(one[name], two[name]) for name in WRITTEN)


def test_a_tiny_second_moment_is_not_zero(device):
    """sqrt must not flush subnormals: 1e-30 would divide."""
    s = state(3, device)
    s |= {
        "g": torch.full((3,), 1e-18, device=device),
        "m": torch.zeros(3, device=device),
        "v": torch.zeros(3, device=device),
    }
    compare(adamw_ema_, s, eps=1e-30)


def test_traced_whole(device):
    compare(torch.compile(adamw_ema_, backend="aot_eager", fullgraph=True), state(17, device))


@pytest.mark.gpu
def test_a_captured_graph_follows_the_scalars(device):
    s = state(BLOCK + 5, device)
    expected, got = ({name: x.clone() for name, x in s.items()} for _ in range(2))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles; skipped, so that nothing moves
        got["skip"].fill_(1.0)
        call(adamw_ema_, got)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        call(adamw_ema_, got)
    for lr, step, clip, skip in [
        (0.1, 1.0, 1.0, 0.0),
        (0.2, 2.0, 0.5, 0.0),
        (0.3, 3.0, 0.5, 1.0),
        (0.3, 3.0, 0.2, 0.0),
    ]:
        for name, value in (("lr", lr), ("step", step), ("clip", clip), ("skip", skip)):
            got[name].fill_(value)
            expected[name].fill_(value)
        graph.replay()
        expected = run(adamw_ema_, expected)
        assert all(torch.equal(got[name], expected[name]) for name in WRITTEN)


@pytest.mark.parametrize("options", [True, False])
def test_is_a_well_formed_custom_op(options, device):
    s = state(BLOCK + 5, device)
    ema, copy, clip, skip = (s[name] if options else None for name in ("ema", "copy", "clip", "skip"))
    torch.library.opcheck(
        adamw_ema,
        (s["p"], s["g"], s["m"], s["v"], ema, copy, s["lr"], s["step"], clip, skip, 0.9, 0.999, 1e-8, 0.1, 0.9),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": torch.ones(3, 1)}, r"p: shape \(3, 1\), expected \(n,\) and at least one element"),
        ({"p": torch.ones(0)}, r"p: shape \(0,\), expected"),
        ({"p": torch.ones(3, dtype=BF16)}, "p: torch.bfloat16, expected float32"),
        ({"g": torch.ones(4)}, r"g: shape \(4,\), p has \(3,\)"),
        ({"g": torch.ones(3, dtype=torch.float64)}, "g: torch.float64, expected float32 or float16 or bfloat16"),
        ({"m": torch.ones(6)[::2]}, r"m: strides \(2,\) of shape \(3,\) are not contiguous"),
        ({"v": torch.ones(3, device="meta")}, "v: on meta, p is on cpu"),
        ({"ema": torch.ones(3, dtype=F16)}, "ema: torch.float16, expected float32"),
        ({"copy": torch.ones(3)}, "copy: torch.float32, expected float16 or bfloat16"),
        ({"lr": torch.ones((), dtype=torch.float64)}, "lr: torch.float64, expected float32"),
        ({"step": torch.ones(2)}, r"step: shape \(2,\) is not that of a scalar"),
        ({"clip": torch.ones((), device="meta")}, "clip: on meta, p is on cpu"),
        ({"skip": torch.ones((), dtype=torch.bool)}, "skip: torch.bool, expected float32"),
        ({"beta1": 1.0}, "beta1: 1.0, expected at least 0 and below 1"),
        ({"beta2": -0.1}, "beta2: -0.1, expected"),
        ({"ema_decay": 1.5}, "ema_decay: 1.5, expected 0 to 1"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        call(adamw_ema_, state(3, "cpu") | change)


def test_bytes():
    assert adamw_ema_bytes(10, BF16, ema=True, copy=BF16) == 360
    assert adamw_ema_bytes(10, F32, ema=False, copy=None) == 280


BUGS = {
    "the last element is left out": ("else offs < n", "else offs < n - 1"),
    "the rest starts at the first block": ("*arguments, whole, n", "*arguments, 0, n"),
    "bias correction by a difference": ("tl.where(x > -0.5, ", "tl.where(x > 0.5, "),
    "bias corrections exchanged": ("_one_minus_exp(step * log_beta2)", "_one_minus_exp(step * log_beta1)"),
    "gradient not clipped": ("g *= tl.load(clip_ptr)", "g *= 1.0"),
    "decay not times lr": ("p -= lr * weight_decay * p", "p -= weight_decay * p"),
    "second moment of the moment": ("one_minus_beta2 * g * g", "one_minus_beta2 * m * m"),
    "eps under the root": ("tl.sqrt_rn(v) / root_c2 + eps", "tl.sqrt_rn(v + eps) / root_c2"),
    "average of the moment": ("one_minus_ema_decay * (p - ema)", "one_minus_ema_decay * (m - ema)"),
    "copy of the moment": ("p.to(copy_ptr.dtype.element_ty)", "m.to(copy_ptr.dtype.element_ty)"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug, device, tmp_path):
    mutant = mutated(Path(module.__file__), *BUGS[bug], tmp_path)
    with pytest.raises(AssertionError):
        compare(mutant.adamw_ema_, state(BLOCK + 5, device, step=1.0), eps=0.1)


def test_a_skip_that_is_ignored_is_found(device, tmp_path):
    mutant = mutated(Path(module.__file__), "if tl.load(skip_ptr) != 0.0:", "if tl.load(skip_ptr) == 2.0:", tmp_path)
    s = state(17, device) | {"skip": scalar(1.0, device)}
    with pytest.raises(AssertionError):
        compare(mutant.adamw_ema_, s)
