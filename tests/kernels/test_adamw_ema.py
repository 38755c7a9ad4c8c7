"""The Triton kernel of AdamW: the contract, and what only this kernel has."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from adamw_contract import BF16, F16, F32, AdamWContract, Rule, call, compare, run, same_bits, scalar, state
from bilevel_kernels.adamw_ema import adamw_ema, adamw_ema_, adamw_ema_bytes
from mutants import mutated

module = import_module("bilevel_kernels.adamw_ema")  # the package's attribute of that name may be the function


def rule(device, step=adamw_ema_):
    return Rule(step, [(F32, BF16), (BF16, BF16), (F16, F16)], device, cuts=device == "cpu")


@pytest.fixture
def adamw(device):
    return rule(device)


class TestContract(AdamWContract):
    pass


def test_traced_whole(device, adamw):
    compare(rule(device, torch.compile(adamw_ema_, backend="aot_eager", fullgraph=True)), state(adamw, 17))


@pytest.mark.gpu
def test_a_captured_graph_follows_the_scalars(adamw):
    s = state(adamw, 1029)
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
        assert same_bits(got, expected)


@pytest.mark.parametrize("options", [True, False])
def test_is_a_well_formed_custom_op(options, adamw):
    s = state(adamw, 1029)
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
        call(adamw_ema_, state(rule("cpu"), 3) | change)


def test_bytes():
    assert adamw_ema_bytes(10, BF16, ema=True, copy=BF16) == 360
    assert adamw_ema_bytes(10, F32, ema=False, copy=None) == 280


BUGS = {
    "the last element is left out": ("else offs < n", "else offs < n - 1"),
    "the rest starts at the first block": ("*numbers, whole, n", "*numbers, 0, n"),
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
        compare(rule(device, mutant.adamw_ema_), state(rule(device), 1029, step=1.0), eps=0.1)


def test_a_skip_that_is_ignored_is_found(device, tmp_path):
    mutant = mutated(Path(module.__file__), "if tl.load(skip_ptr) != 0.0:", "if tl.load(skip_ptr) == 2.0:", tmp_path)
    s = state(rule(device), 17) | {"skip": scalar(1.0, device)}
    with pytest.raises(AssertionError):
        compare(rule(device, mutant.adamw_ema_), s)
