"""The kernel benchmark: who wins, which goals are reached, and what the page and the command line say."""

import ast
import importlib
import json

import pytest
import torch

from benchmarks import ROOT
from benchmarks.kernels import sweep as kernels
from benchmarks.kernels import tuning
from benchmarks.kernels.cases import OPS, TUNED, Case
from benchmarks.kernels.goals import GOALS, goals, reached
from benchmarks.kernels.once import calls
from benchmarks.kernels.page import measured, page
from benchmarks.measure import Unavailable, evict
from bilevel_fast.base.errors import UserError
from bilevel_fast.ops.reasons import IMPLEMENTED
from bilevel_fast.profiling.cost import Counter
from commands import run_command

CPU, META = torch.device("cpu"), torch.device("meta")


def row(op, case, provider, value, numel=10, **more):
    return {"op": op, "case": case, "provider": provider, "value": value, "numel": numel, "dtype": "float32", **more}


def test_the_ranking_of_a_class_is_over_all_of_its_cases():
    rows = [
        *(row("geglu", "a", "torch", 10.0), row("geglu", "b", "torch", 10.0)),
        *(row("geglu", "a", "triton", 2.0), row("geglu", "b", "triton", 12.0)),  # 2.0x in the geometric mean
        *(row("geglu", "a", "native", 7.0), row("geglu", "b", "native", 7.0)),  # 1.4x
        *(row("geglu", "a", "compile", 1.0), row("geglu", "b", "compile", 1.0)),  # nothing that dispatch.py can call
    ]
    assert tuning.rankings(rows) == {"geglu": {"small": ["triton", "native", "torch"]}}


def test_who_lacks_a_case_is_judged_by_the_others():
    """Also where it is torch that could not run one."""
    rows = [row("adamw_ema", "small", name, us) for name, us in (("torch", 10.0), ("triton", 5.0), ("cuda", 4.0))]
    rows += [row("adamw_ema", "large", "torch", None), row("adamw_ema", "large", "triton", 50.0)]
    assert tuning.rankings(rows) == {"adamw_ema": {"small": ["cuda", "triton", "torch"]}}
    rows += [row("adamw_ema", "other", "torch", 10.0), row("adamw_ema", "other", "triton", 1.0)]
    assert tuning.rankings(rows) == {"adamw_ema": {"small": ["triton", "cuda", "torch"]}}


def test_torch_stays_where_nobody_wins_clearly():
    close = [row("geglu", "a", "torch", 1.02), row("geglu", "a", "triton", 1.0)]
    assert tuning.rankings(close) == {"geglu": {"small": ["torch"]}}
    unable = [row("geglu", "a", "torch", 10.0), row("geglu", "a", "triton", None)]
    assert tuning.rankings(unable) == {"geglu": {"small": ["torch"]}}
    assert tuning.rankings([row("geglu", "a", "triton", 1.0)]) == {}, "no torch to compare with"


def test_classes_are_apart():
    large = {"numel": 2**22}
    rows = [row("geglu", "a", "torch", 10.0), row("geglu", "a", "triton", 20.0)]
    rows += [row("geglu", "b", "torch", 10.0, **large), row("geglu", "b", "triton", 5.0, **large)]
    assert tuning.rankings(rows) == {"geglu": {"small": ["torch"], "large": ["triton", "torch"]}}


def test_tune_replaces_what_was_measured(tmp_path):
    path = tmp_path / "providers.json"
    path.write_text(json.dumps({"sm_90": {"geglu": {"small": "triton"}}, "cpu": {"geglu": {"small": "native"}}}))
    rows = [row("feature_kd", "a", "torch", 2.0), row("feature_kd", "a", "native", 1.0)]
    tuning.tune([*rows, *(row("geglu", "a", name, 1.0, architecture="sm_80") for name in ("torch", "triton"))], path)
    assert json.loads(path.read_text()) == {
        "sm_90": {"geglu": {"small": "triton"}},
        "cpu": {"geglu": {"small": "native"}, "feature_kd": {"small": ["native", "torch"]}},
        "sm_80": {"geglu": {"small": ["torch"]}},
    }
    with pytest.raises(UserError, match="no case was measured with torch"):
        tuning.tune([row("feature_kd", "a", "native", 1.0)], path)


def test_whatever_the_engine_chooses_can_be_tuned():
    """The names that `choose` is called with, by the sources: those of the cases, and no other."""
    found = set()
    for path in (ROOT / "bilevel_fast").rglob("*.py"):
        if path.name == "reasons.py":
            continue  # asks for each that there is
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "from bilevel_fast.ops.providers import" in text else ():
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "choose" and len(node.args) > 2:
                assert isinstance(node.args[0], ast.Constant), f"{path}: a name that nobody can read"
                found.add(node.args[0].value)
    cases = {case.op for op in TUNED for case in _module(op).cases(2, META, torch.bfloat16)}
    assert found <= cases
    assert found == set(IMPLEMENTED) > {"mixture", "pruned_attention"}


def _module(op):
    return importlib.import_module(f"benchmarks.kernels.cases.{op}")


@pytest.mark.parametrize("op", TUNED)
def test_all_who_are_ranked_do_the_same_work(op):
    """FLOPs of matrix products, counted on no device; of a product on a mask a ranking would say nothing."""
    for case in _module(op).cases(4, META, torch.bfloat16):
        flops = {}
        for name in ("triton", "torch", *(["sdpa_flash"] if op == "pruned_attention" else [])):
            call = case.providers[name]()
            with Counter() as counter:
                call()
            flops[name] = sum(cost.flops for cost in counter.costs)
        if op != "structured_conv2d":  # the engine does not choose it: a student is stored as cut
            assert len(set(flops.values())) == 1, (case.name, flops)
        if op == "pruned_attention":
            assert flops["triton"] == case.flops


def test_geglu_in_torch_has_no_channel_that_was_dropped():
    kept = next(
        case for case in _module("geglu").cases(2, CPU, torch.bfloat16) if "64x5120 b2 0.55 kept fwd" in case.name
    )
    assert kept.providers["torch"]()().shape == (2, 64, 17 * 160)


def test_goals_say_how_many_and_which_is_worst():
    rows = [row("geglu", case, "compile", 12.0) for case in ("a", "b")]
    rows += [row("geglu", "a", "triton", 8.0, roofline=0.9), row("geglu", "b", "triton", 12.0, roofline=0.5)]
    (line,) = (line for line in goals(rows) if line.startswith("| geglu"))
    assert line == "| geglu | 1.20 times torch.compile | 1 of 2 cases | 1.25 | 1.00 in b |"
    assert sum("not measured" in line for line in goals(rows)) == len(GOALS) - 1
    assert {goal.op for goal in GOALS} <= set(OPS)


def test_the_goal_of_a_norm_follows_its_passes():
    """By hand: 60 % of the roofline are 90 % of what two passes can move, where L2 does not hold x."""
    norm = {"roofline": 0.6, "l2_bytes": 40}
    rows = [
        row("group_norm_silu", "a fwd", "triton", 1.0, **norm),
        row("group_norm_silu", "b bwd", "triton", 1.0, **norm),
    ]
    assert next(found.values for found in reached(rows)) == pytest.approx({"a fwd": 0.6, "b bwd": 0.6})
    rows = [{**r, "numel": 11} for r in rows]
    assert next(found.values for found in reached(rows)) == pytest.approx({"a fwd": 0.9, "b bwd": 1.0})


def test_a_cold_cache_is_not_a_dirty_one():
    cache = torch.zeros(8)
    evict(cache)
    assert cache._version == 0, "written"


def test_rivals_are_timed_together_and_the_missing_say_why():
    def cannot():
        raise Unavailable("needs a larger purse")

    case = Case("geglu", "a fwd", {"torch": lambda: lambda: None, "apex": cannot}, bytes=8, numel=2)
    one, other = kernels.measure(case, 3, CPU, (1e9, 1e9))
    assert one["provider"] == "torch"
    assert 0 < one["p20"] <= one["value"] <= one["p80"]
    assert (other["provider"], other["value"], other["why"]) == ("apex", None, "needs a larger purse")
    assert "not measured: needs a larger purse" in kernels.text(other)
    assert "needs a larger purse" in measured([{**one, "dtype": "float32"}, {**other, "dtype": "float32"}])[-1]


def run(*arguments):
    return run_command(kernels.main, *arguments)


def test_rows_are_appended_once(tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = ("--op", "feature_kd", "--batch", "2", "--rounds", "2", "--out", str(out), "--json")
    first, second = run(*arguments), run(*arguments)
    assert first.returncode == 0, first.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [json.loads(line) for line in first.stdout.splitlines()] == rows
    assert second.stdout == "", "measured already"
    assert {row["provider"] for row in rows} == {"native", "torch"}
    for field in ("value", "p20", "p80", "roofline", "device", "torch", "triton", "commit", "date", "copy_gb_per_s"):
        assert rows[0][field], field


def test_bad_input_is_one_line():
    assert run("--op", "geglo").stderr == "error: --op geglo: no such op; did you mean 'geglu'?\n"
    assert run("--op", "geglu").stderr.startswith("error: nothing to measure: no implementation of geglu but torch's")
    if not torch.cuda.is_available():
        assert run("--device", "cuda").stderr == "error: --device cuda: this machine has no GPU\n"


def test_the_sanitizer_sees_every_op():
    assert {name.split()[0] for name, _ in calls(CPU)} == set(OPS)


def test_the_page_is_what_the_results_say():
    assert (ROOT / "kernels" / "README.md").read_text() == page()
