"""What is said of a provider is what `dispatch` chooses."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from bilevel_fast.base.errors import UserError
from bilevel_fast.ops import dispatch as ops
from bilevel_fast.ops import providers, reasons

ROOT = Path(__file__).parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
NO_GPU = {"triton": "it wants a GPU", "cuda": "it is not built", "xformers": "it does not load"}


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv("BILEVEL_FAST_OPS", raising=False)


def said(device: torch.device, missing: dict[str, str]) -> dict[str, reasons.Choice]:
    return {choice.op: choice for choice in reasons.choices(device, missing)}


def test_the_ops_are_those_that_are_asked_for():
    source = "".join(path.read_text() for path in (ROOT / "bilevel_fast").rglob("*.py"))
    assert set(re.findall(r'\bchoose\(\s*"(\w+)"', source)) == set(reasons.IMPLEMENTED)


@pytest.mark.parametrize("side", [8, 96], ids=["small", "medium"])
def test_what_is_said_is_what_is_chosen(side, monkeypatch):
    chosen = {}

    def spy(op, device, numel, *able, **options):
        chosen[op, providers.size_class(numel)] = provider = providers.choose(op, device, numel, *able, **options)
        return provider

    monkeypatch.setattr(ops, "choose", spy)
    x = torch.randn(1, 32, side, side).to(memory_format=torch.channels_last)
    rows = torch.randn(1, side * side, 32)
    ops.group_norm_silu(x, nn.GroupNorm(4, 32))
    ops.add_norm(rows, rows, nn.LayerNorm(32))
    ops.attention(rows[:, :64], rows[:, :64], rows[:, :64], 2)
    ops.geglu(rows, nn.Linear(32, 64))
    ops.denoise_loss(x, x, x, torch.ones(1), 1.0, 1.0)
    ops.feature_kd([x], [x], 1.0)
    found = said(CPU, ops.missing(CPU))
    assert len(chosen) >= 6
    assert {key: found[key[0]].runs[key[1]] for key in chosen} == chosen
    assert chosen["group_norm_silu", "small" if side == 8 else "medium"] == "native"


def test_why_on_a_cpu():
    found = said(CPU, NO_GPU)
    assert found["group_norm_silu"].runs == {"small": "native", "medium": "native", "large": "torch"}
    assert found["group_norm_silu"].why == "measured; triton wanted on sm_80+"
    assert found["layer_norm"].why == "unmeasured; triton wanted on sm_80+"
    assert found["linear_geglu"].why == "unmeasured; triton wanted on sm_80..89"
    assert found["pruned_attention"].why == "unmeasured"
    assert found["mixture"].why == "unmeasured; triton wanted on any GPU"


@pytest.mark.parametrize(("here", "geglu"), [("sm_86", "triton"), ("sm_90", "torch")])
def test_why_on_a_card(here, geglu, monkeypatch):
    monkeypatch.setattr(providers, "architecture", lambda device: here)
    found = said(GPU, {"native": "its code is for the CPU", "xformers": "it does not load"})
    assert set(found["layer_norm"].runs.values()) == {"triton"}
    assert found["layer_norm"].why == "projected"
    assert set(found["linear_geglu"].runs.values()) == {geglu}
    assert set(found["mixture"].runs.values()) == {"triton"}
    assert found["mixture"].why == "torch has no such op"


def test_what_is_wanted_and_cannot_run(monkeypatch):
    monkeypatch.setitem(providers.TABLE["cpu"], "layer_norm", {"small": ["triton", "torch"]})
    assert said(CPU, NO_GPU)["layer_norm"].why == "measured; triton wanted, but it wants a GPU"
    monkeypatch.setenv("BILEVEL_FAST_OPS", "native")
    assert said(CPU, NO_GPU)["layer_norm"].why == "BILEVEL_FAST_OPS=native, but it has no layer_norm"
    assert said(CPU, NO_GPU)["feature_kd"].why == "BILEVEL_FAST_OPS=native"
    monkeypatch.setenv("BILEVEL_FAST_OPS", "tritn")
    with pytest.raises(UserError, match="did you mean 'triton'"):
        reasons.choices(CPU, NO_GPU)


def test_torch_knows_the_architecture_as_a_constant():
    """The mark that torch's own decorator would set: `torch.compile` must not trace into a question to the driver."""

    def marked(device):
        return device

    assert vars(torch.compiler.assume_constant_result(marked)) == vars(providers.architecture)
