"""What every AdamW step keeps to; a file of tests has the fixture `adamw` and a subclass of `AdamWContract`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bilevel_kernels.adamw_ema import adamw_ema_ref
from numerics import assert_no_worse_than_eager

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WRITTEN = ("p", "m", "v", "ema", "copy")
BLOCKS = 2053  # two of Triton's and a rest that 16 does not divide
SETTINGS = [
    *({"beta1": 0.0}, {"beta2": 0.0}, {"beta1": 0.5, "beta2": 0.9}, {"eps": 1.0}),
    *({"weight_decay": 0.0}, {"ema_decay": 0.0}, {"ema_decay": 1.0}),
]


@dataclass(frozen=True)
class Rule:
    """An implementation with the signature of `adamw_ema_ref`, and what it takes."""

    step: Callable[..., None]
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]]  # of gradients and copies
    device: str = "cpu"
    cuts: bool = False  # Triton's interpreter cuts bf16 off, where a GPU rounds


def scalar(value: float, device: str) -> Tensor:
    return torch.tensor(value, device=device, dtype=F32)


def state(rule: Rule, n: int, dtypes=None, step=3.0) -> dict[str, Tensor]:
    """All tensors that a call takes, as in the middle of a training: nothing is zero."""
    grad, copy = dtypes or rule.dtypes[0]
    s = {"p": torch.randn(n), "g": torch.randn(n), "m": torch.randn(n), "v": torch.rand(n), "ema": torch.randn(n)}
    s = {name: x.to(rule.device) for name, x in s.items()}
    s["g"], s["copy"] = s["g"].to(grad), torch.zeros(n, device=rule.device, dtype=copy)
    return s | {name: scalar(x, rule.device) for name, x in {"lr": 0.1, "step": step, "clip": 0.7, "skip": 0.0}.items()}


def call(step, s, **settings) -> None:
    step(*(s[name] for name in "pgmv"), **{name: x for name, x in s.items() if name not in "pgmv"}, **settings)


def run(step, s, **settings) -> dict[str, Tensor]:
    s = {name: x.clone() for name, x in s.items()}
    call(step, s, **settings)
    return s


def compare(rule, s, **settings) -> dict[str, Tensor]:
    """Against the formula in fp64, by the errors that it has in fp32; returns what the step left."""
    settings = {"weight_decay": 0.2, "ema_decay": 0.9} | settings  # large, so that what is wrong is seen
    gold = run(adamw_ema_ref, {name: x.double() for name, x in s.items()}, **settings)
    eager = run(adamw_ema_ref, s, **settings)
    found = run(rule.step, s, **settings)
    for name in s:
        if name in WRITTEN:
            assert_no_worse_than_eager(name, found[name], eager[name], gold[name])
        else:
            assert torch.equal(found[name], s[name]), f"{name} was written"
    if "copy" in s and not (rule.cuts and s["copy"].dtype == BF16):
        assert torch.equal(found["copy"], found["p"].to(s["copy"].dtype)), "copy is not p, rounded"
    return found


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == F32 else torch.int16)


def same_bits(a, b) -> bool:
    return all(torch.equal(bits(a[name]), bits(b[name])) for name in WRITTEN if name in a and name in b)


class AdamWContract:
    # odd, whole vectors, a block of Triton (1024), CUDA (8192) and the CPU (2^14), and one or a few more
    @pytest.mark.parametrize("n", [1, 7, 8, 17, 33, 1024, BLOCKS, 8193, 2**14 + 1])
    def test_as_good_as_eager(self, n, adamw):
        for dtypes in adamw.dtypes:
            compare(adamw, state(adamw, n, dtypes))

    @pytest.mark.parametrize("left_out", ["clip", "ema", "copy", "skip", "ema copy"])
    def test_each_option_may_be_left_out(self, left_out, adamw):
        s = state(adamw, BLOCKS)
        fewer = {name: x for name, x in s.items() if name not in left_out.split()}
        found = compare(adamw, fewer)
        if left_out != "clip":
            assert same_bits(found, compare(adamw, s)), "what is left out changes something else"

    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    def test_settings(self, settings, adamw):
        compare(adamw, state(adamw, 17), **settings)

    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    def test_ten_steps_are_those_of_torch(self, weight_decay, adamw):
        """From zero moments, with a warm-up whose learning rates are representable in fp32."""
        start, grads = torch.randn(BLOCKS, device=adamw.device), torch.randn(10, BLOCKS, device=adamw.device)

        def by_torch(dtype, **how):
            p = start.to(dtype, copy=True).requires_grad_()
            optimizer = torch.optim.AdamW([p], weight_decay=weight_decay, **how)
            for t, g in enumerate(grads):
                optimizer.param_groups[0]["lr"] = 2.0**-8 * (t + 1)
                p.grad = g.to(dtype)
                optimizer.step()
            return p.detach(), optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]

        p, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        lr, step = scalar(0.0, adamw.device), scalar(0.0, adamw.device)
        for g in grads:
            lr += 2.0**-8
            step += 1
            adamw.step(p, g, m, v, lr=lr, step=step, weight_decay=weight_decay)
        gold, fused = by_torch(torch.float64, foreach=False), by_torch(F32, fused=True)
        for name, k, e, o in zip("pmv", (p, m, v), fused, gold, strict=True):
            assert_no_worse_than_eager(name, k, e, o)
        ulp = torch.finfo(F32).eps * gold[0].abs().clamp(min=2.0**-8 * 55)  # or of the way it came
        assert ((p.double() - gold[0]).abs() <= 4 * ulp).all()

    @pytest.mark.parametrize("beta", [0.5, 0.9, 0.999, 0.9999])
    def test_bias_corrections(self, beta, adamw):
        """Moments and gradient of 1 stay 1: p moves by -1 / c1, and by -sqrt(c2)."""
        one = scalar(1.0, adamw.device)
        for step in (1, 2, 3, 4, 5, 10, 100, 500, 700, 1_000, 10_000, 100_000, 10_000_000):
            c = -math.expm1(step * math.log(beta))
            wanted = [({"beta1": beta, "beta2": 0.0}, -1 / c), ({"beta1": 0.0, "beta2": beta}, -math.sqrt(c))]
            for settings, expected in wanted:
                p, *gmv = torch.tensor([0.0, 1.0, 1.0, 1.0], device=adamw.device).split(1)
                adamw.step(p, *gmv, lr=one, step=scalar(float(step), adamw.device), eps=1e-30, **settings)
                assert p.item() == pytest.approx(expected, rel=5e-7), step

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("skip", [1.0, -0.5, float("nan")])
    def test_skip_leaves_every_bit(self, skip, bad, adamw):
        s = state(adamw, BLOCKS)
        for name in WRITTEN:  # any bits: NaNs with a payload among them
            bits(s[name]).random_()
        s["g"].fill_(bad)
        s["skip"] = scalar(skip, adamw.device)
        assert same_bits(run(adamw.step, s), s)

    def test_a_bad_gradient_without_skip_is_seen(self, adamw):
        s = state(adamw, 17)
        s["g"][3] = float("nan")
        p = run(adamw.step, s)["p"]
        assert p[3].isnan()
        assert p.isfinite().sum() == 16

    @pytest.mark.parametrize("n", [5, 1023, 1024, BLOCKS, 2**14 + 1])
    def test_views_at_any_address_and_nothing_beyond_them(self, n, adamw):
        """Every buffer starts at another offset of its storage; what lies around it is neither read nor written."""
        s = state(adamw, n)
        views, around = dict(s), {}
        for i, name in enumerate((*WRITTEN, "g"), start=1):
            around[name] = torch.full((n + 2048,), float("nan"), device=adamw.device, dtype=s[name].dtype)
            views[name] = around[name][i : n + i].copy_(s[name])
        call(adamw.step, views)
        assert same_bits(views, run(adamw.step, s))
        for name, storage in around.items():
            views[name].fill_(float("nan"))
            assert storage.isnan().all(), f"{name}: written outside"

    def test_same_bits_twice(self, adamw):
        s = state(adamw, BLOCKS)
        assert same_bits(run(adamw.step, s), run(adamw.step, s))

    def test_a_tiny_second_moment_is_not_zero(self, adamw):
        """sqrt must not flush subnormals: 1e-30 would divide."""
        s = state(adamw, 3)
        s["g"].fill_(1e-18), s["m"].zero_(), s["v"].zero_()
        compare(adamw, s, eps=1e-30)
