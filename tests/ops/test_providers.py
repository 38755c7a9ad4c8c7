import json
from pathlib import Path

import pytest
import torch

from benchmarks.structures import structure
from bilevel_fast.base.errors import UserError
from bilevel_fast.ops import dispatch as ops
from bilevel_fast.ops import providers
from bilevel_fast.ops.providers import choose, notes
from bilevel_fast.profiling.meta_steps import Steps

CPU = torch.device("cpu")
SHIPPED = providers.TABLE
SMALL, MEDIUM, LARGE = (CPU, 8), (CPU, 2**20), (CPU, 2**22)


@pytest.fixture(autouse=True)
def _table(monkeypatch):
    table = {"cpu": {"op": {"small": "native", "large": "triton"}}, "sm_90": {"op": {"small": "triton"}}}
    monkeypatch.setattr(providers, "TABLE", table)
    monkeypatch.delenv("BILEVEL_FAST_OPS", raising=False)


def test_the_table_decides_by_size():
    assert choose("op", *SMALL, "native", "triton") == "native"
    assert choose("op", *LARGE, "native", "triton") == "triton"


def test_what_the_table_does_not_name_is_torch():
    assert choose("other", *SMALL, "native") == "torch"
    assert choose("op", *MEDIUM, "native", "triton") == "torch"
    assert choose("op", torch.device("meta"), 8, "native", "triton") == "torch"


def test_a_winner_that_cannot_take_the_input_is_torch():
    assert choose("op", *SMALL, "triton") == "torch"
    assert choose("op", *SMALL) == "torch"


def test_of_a_ranking_the_first_that_can_take_the_input_runs(monkeypatch):
    ranking = ["cuda", "triton", "torch", "native"]
    monkeypatch.setattr(providers, "TABLE", {"cpu": {"op": {"small": ranking}}})
    assert choose("op", *SMALL, "triton", "cuda") == "cuda"
    assert choose("op", *SMALL, "triton", "native") == "triton"
    assert choose("op", *SMALL, "native") == "torch"
    assert choose("op", *SMALL) == "torch"


def test_the_environment_overrules_the_table(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")
    assert choose("op", *SMALL, "native") == "torch"
    monkeypatch.setenv("BILEVEL_FAST_OPS", "triton")
    assert choose("op", *SMALL, "native", "triton") == "triton"
    assert choose("op", *SMALL, "native") == "torch"


def test_a_mistyped_provider(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "tritn")
    with pytest.raises(UserError, match=r"BILEVEL_FAST_OPS=tritn .* no such provider; did you mean 'triton'"):
        choose("op", *SMALL)


def test_what_was_asked_for_and_is_missing_is_named(monkeypatch):
    missing = {"xformers": "it does not load; run: pip install xformers"}
    assert notes(CPU, missing) == []
    monkeypatch.setenv("BILEVEL_FAST_OPS", "xformers")
    assert notes(CPU, missing) == [
        "BILEVEL_FAST_OPS=xformers: it does not load; run: pip install xformers; torch runs all ops instead"
    ]
    monkeypatch.setenv("BILEVEL_FAST_OPS", "native")
    assert notes(CPU, missing) == []


def test_hardware_that_nobody_measured_is_named(monkeypatch):
    (note,) = notes(torch.device("meta"), {})
    assert note == (
        "no op was measured on meta (only on cpu, sm_90), torch runs them all; "
        "to measure: OUT=results bash benchmarks/gpu.sh"
    )


def on(card, monkeypatch):
    monkeypatch.setattr(providers, "architecture", lambda _: card)
    monkeypatch.setitem(providers.TABLE, "projected", {"op": {"small": "cuda"}, "new": {"small": "triton"}})
    return torch.device("meta")


@pytest.mark.parametrize(
    ("card", "op", "new"),
    [("sm_80", "cuda", "triton"), ("sm_90", "triton", "triton"), ("sm_120", "cuda", "triton"),
     ("sm_75", "torch", "torch"), ("cpu", "native", "torch")],
)  # fmt: skip
def test_new_cards_have_projected_defaults_until_they_are_measured(card, op, new, monkeypatch):
    device = on(card, monkeypatch)
    assert choose("op", device, 8, "native", "triton", "cuda") == op
    assert choose("new", device, 8, "triton") == new


@pytest.mark.parametrize(("card", "chosen"), [("sm_75", "torch"), ("sm_86", "triton"), ("sm_90", "torch"),
                                              ("sm_100", "torch"), ("cpu", "torch")])  # fmt: skip
def test_older_cards_have_projected_defaults_of_their_own(card, chosen, monkeypatch):
    device = on(card, monkeypatch)
    monkeypatch.setitem(providers.TABLE, "projected before sm_90", {"older": {"small": "triton"}})
    assert choose("older", device, 8, "triton") == chosen
    monkeypatch.setitem(providers.TABLE, card, {"older": {"small": "torch"}})
    assert choose("older", device, 8, "triton") == "torch", "measured"


def test_a_run_says_which_defaults_are_projected(monkeypatch):
    assert notes(on("sm_90", monkeypatch), {}) == [
        "projected, not measured on sm_90: triton runs new; to measure: OUT=results bash benchmarks/gpu.sh"
    ]
    assert notes(on("cpu", monkeypatch), {}) == []
    assert "(only on cpu, sm_90), torch runs them all" in notes(on("sm_75", monkeypatch), {})[0]


def test_what_is_missing_on_a_cpu():
    assert set(ops.missing(CPU)) >= {"cuda", "xformers"}
    assert "native" not in ops.missing(CPU)
    assert set(ops.missing(CPU)) < set(providers.PROVIDERS)


def test_size_classes():
    assert [providers.size_class(n) for n in (1, 2**18 - 1, 2**18, 2**22 - 1, 2**22)] == [
        *("small", "small", "medium", "medium", "large"),
    ]


def test_a_step_on_a_new_card_copies_no_activation(monkeypatch):
    """Torch's GroupNorm would: from channels_last and back."""
    monkeypatch.setattr(providers, "TABLE", SHIPPED)
    monkeypatch.setattr(providers, "architecture", lambda device: "sm_90" if device.type == "meta" else device.type)
    steps = Steps(structure("0.80", tiny=True), 8, 7, 2, torch.device("meta"), torch.bfloat16)
    costs = [cost for cost in steps.count(steps.lower) if cost.room in ("teacher", "student", "backward")]
    copies = {cost.op for cost in costs if cost.kind == "copy" and cost.bytes > 2**14}
    assert copies <= {"aten::cat"}, "only the skip connections are copied"
    ours = {cost.op.removeprefix("bilevel_kernels::") for cost in costs if cost.op.startswith("bilevel_kernels")}
    assert ours >= {f"{op}_{way}" for op in ("group_norm_silu", "layer_norm", "geglu") for way in ("fwd", "bwd")}
    assert not any("pruned_attention" in op for op in ours)


def test_the_shipped_table_is_well_formed():
    shipped = json.loads((Path(providers.__file__).parent / "providers.json").read_text())
    for architecture, table in shipped.items():
        assert architecture in ("cpu", providers.PROJECTED, providers.BEFORE_SM_90) or architecture.startswith("sm_")
        for sizes in table.values():
            assert set(sizes) <= {*providers.SIZES, "large"}
            for ranking in sizes.values():
                assert {ranking} if isinstance(ranking, str) else set(ranking) <= set(providers.PROVIDERS)
