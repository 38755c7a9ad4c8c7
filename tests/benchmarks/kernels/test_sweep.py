"""The kernel benchmark: who wins, which goals are reached, and what the page and the command line say."""

import json
import subprocess
import sys

import torch

from benchmarks import ROOT
from benchmarks.kernels import sweep as kernels
from benchmarks.kernels import tuning
from benchmarks.kernels.cases import OPS, Case
from benchmarks.kernels.goals import GOALS, goals
from benchmarks.kernels.once import calls
from benchmarks.kernels.page import measured, page
from benchmarks.measure import Unavailable

CPU = torch.device("cpu")


def row(op, case, provider, value, numel=10, **more):
    return {"op": op, "case": case, "provider": provider, "value": value, "numel": numel, "dtype": "float32", **more}


def test_the_winner_of_a_class_is_the_fastest_over_all_of_its_cases():
    rows = [
        *(row("geglu", "a", "torch", 10.0), row("geglu", "b", "torch", 10.0)),
        *(row("geglu", "a", "triton", 2.0), row("geglu", "b", "triton", 12.0)),  # 2.0x in the geometric mean
        *(row("geglu", "a", "native", 7.0), row("geglu", "b", "native", 7.0)),  # 1.4x
        *(row("geglu", "a", "compile", 1.0), row("geglu", "b", "compile", 1.0)),  # nothing that dispatch.py can call
    ]
    assert tuning.winners(rows) == {"geglu": {"small": "triton"}}


def test_torch_stays_where_nobody_wins_clearly_or_everywhere():
    close = [row("geglu", "a", "torch", 1.02), row("geglu", "a", "triton", 1.0)]
    assert tuning.winners(close) == {"geglu": {"small": "torch"}}
    partial = [row("geglu", "a", "torch", 10.0), row("geglu", "b", "torch", 10.0), row("geglu", "a", "triton", 1.0)]
    assert tuning.winners(partial) == {"geglu": {"small": "torch"}}
    unable = [row("geglu", "a", "torch", 10.0), row("geglu", "a", "triton", None)]
    assert tuning.winners(unable) == {"geglu": {"small": "torch"}}
    assert tuning.winners([row("geglu", "a", "triton", 1.0)]) == {}, "no torch to compare with"


def test_classes_are_apart():
    large = {"numel": 2**22}
    rows = [row("geglu", "a", "torch", 10.0), row("geglu", "a", "triton", 20.0)]
    rows += [row("geglu", "b", "torch", 10.0, **large), row("geglu", "b", "triton", 5.0, **large)]
    assert tuning.winners(rows) == {"geglu": {"small": "torch", "large": "triton"}}


def test_tune_replaces_one_architecture(tmp_path, monkeypatch):
    path = tmp_path / "providers.json"
    path.write_text(json.dumps({"sm_90": {"geglu": {"small": "triton"}}, "cpu": {"geglu": {"small": "native"}}}))
    monkeypatch.setattr(tuning, "PATH", path)
    tuning.tune([row("feature_kd", "a", "torch", 2.0), row("feature_kd", "a", "native", 1.0)], CPU)
    assert json.loads(path.read_text()) == {
        "sm_90": {"geglu": {"small": "triton"}},
        "cpu": {"geglu": {"small": "native"}, "feature_kd": {"small": "native"}},
    }


def test_goals_say_how_many_and_which_is_worst():
    rows = [row("geglu", case, "compile", 12.0) for case in ("a", "b")]
    rows += [row("geglu", "a", "triton", 8.0, roofline=0.9), row("geglu", "b", "triton", 12.0, roofline=0.5)]
    (line,) = (line for line in goals(rows) if line.startswith("| geglu"))
    assert line == "| geglu | 1.20 times torch.compile | 1 of 2 cases | 1.25 | 1.00 in b |"
    assert sum("not measured" in line for line in goals(rows)) == len(GOALS) - 1
    assert {goal.op for goal in GOALS} <= set(OPS)


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
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.sweep", *arguments], cwd=ROOT, capture_output=True, text=True
    )


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
