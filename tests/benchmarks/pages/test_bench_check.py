"""What `make bench-check` fails on, what it leaves alone, the counts it is built on, and the workflow that runs it."""

import importlib.util
import json
import re
import sys

import pytest
import torch
from torch import nn

from benchmarks import ROOT
from benchmarks.counts import launches
from benchmarks.pages import bench_check
from benchmarks.pages.bench_check import BASELINE, Found, belongs, renewed
from benchmarks.rows import read
from benchmarks.structures import structure
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import SD21
from bilevel_fast.models.unet import UNet
from bilevel_fast.training.phases import phase
from commands import run_command
from releases import of_this_torch

WORKFLOW = ROOT / ".github" / "workflows" / "bench.yml"


def row(suite, value, metric="ms", case="lower", device="chip", **more):
    shared = {"suite": suite, "case": case, "provider": "ours", "metric": metric, "device": device, "threads": None}
    return {**shared, "value": value, **more}


def check(monkeypatch, tmp_path, parts, baseline, *arguments):
    """Run the check with these parts (name -> Found or UserError) against these rows: exit code."""

    def part(found):
        def run(settings, rows):
            if isinstance(found, Exception):
                raise found
            return found

        return run

    monkeypatch.setattr(bench_check, "PARTS", {name: part(found) for name, found in parts.items()})
    path = tmp_path / "baseline.jsonl"
    if baseline is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in baseline))
    monkeypatch.setattr(sys, "argv", ["bench_check", "--baseline", str(path), *arguments])
    try:
        bench_check.main()
    except SystemExit as end:
        return end.code
    return 0


def test_the_macs_are_those_of_sd21():
    found = {(r["case"], r["metric"]): r["value"] for r in bench_check.macs(bench_check.Settings(), []).rows}
    assert round(found["sd21 dense", "macs"] / 1e9, 3) == 402.784
    assert round(found["sd21 dense", "official_macs"] / 1e9, 3) == 464.327
    assert found["sd21 dense", "params"] == 865_910_724
    for share in (0.80, 0.55):
        ratio = found[f"sd21 {share:.2f}", "macs"] / found["sd21 dense", "macs"]
        assert share - 2e-4 < ratio <= share


def test_a_worse_row_fails_and_a_better_one_does_not(monkeypatch, tmp_path, capsys):
    old = [row("step", 2.0, "times_faster_than_released")]
    for new, code in ((1.8, 1), (1.99, 0), (2.5, 0)):
        found = {"step": Found([row("step", new, "times_faster_than_released")])}
        assert check(monkeypatch, tmp_path, found, old) == code, new
    assert "times_faster_than_released" in capsys.readouterr().out
    noisy = [row("step", 2.0, "times_faster_than_released", p20=1.7, p80=2.2)]
    found = {"step": Found([row("step", 1.8, "times_faster_than_released", p20=1.6, p80=1.9)])}
    assert check(monkeypatch, tmp_path, found, noisy) == 0
    assert "within noise" in capsys.readouterr().out


def test_one_mac_more_fails_and_so_does_a_count_that_is_gone(monkeypatch, tmp_path):
    old = [row("macs", 1000, "macs"), row("launches", 50, "launches")]
    same = {"macs": Found(old[:1]), "launches": Found(old[1:])}
    assert check(monkeypatch, tmp_path, same, old) == 0
    assert check(monkeypatch, tmp_path, {**same, "macs": Found([row("macs", 1001, "macs")])}, old) == 1
    assert check(monkeypatch, tmp_path, {**same, "launches": Found([row("launches", 52, "launches")])}, old) == 1
    assert check(monkeypatch, tmp_path, {**same, "launches": Found()}, old) == 1
    assert check(monkeypatch, tmp_path, {"macs": Found(old[:1])}, old) == 0, "a part that does not run loses nothing"


def test_a_timing_of_another_machine_is_not_judged(monkeypatch, tmp_path, capsys):
    found = {"step": Found([row("step", 9.0, device="other")])}
    assert check(monkeypatch, tmp_path, found, [row("step", 1.0)]) == 0
    assert "was chip, now other: not compared" in capsys.readouterr().out


def test_complaints_and_failing_parts_fail_and_the_others_still_run(monkeypatch, tmp_path, capsys):
    good = {"macs": Found([row("macs", 1000, "macs")], notes=["all is well"])}
    baseline = [row("macs", 1000, "macs")]
    bad = {"compile_matrix": Found(complaints=["compile_matrix: 8 bytes spilled"])}
    assert check(monkeypatch, tmp_path, {**bad, **good}, baseline) == 1
    assert check(monkeypatch, tmp_path, {"step": UserError("diffusers is not installed"), **good}, baseline) == 1
    out = capsys.readouterr().out
    for line in ("compile_matrix: 8 bytes spilled", "step: diffusers is not installed", "all is well"):
        assert line in out


def test_only_and_skip_choose_the_parts(monkeypatch, tmp_path):
    parts = {"macs": Found([row("macs", 1, "macs")]), "step": Found([row("step", 5.0)])}
    old = [row("macs", 1, "macs"), row("step", 1.0)]
    assert check(monkeypatch, tmp_path, parts, old) == 1
    assert check(monkeypatch, tmp_path, parts, old, "--only", "macs") == 0
    assert check(monkeypatch, tmp_path, parts, old, "--skip", "step", "gpu") == 0
    with pytest.raises(UserError, match="leave no part to run"):
        check(monkeypatch, tmp_path, parts, old, "--only", "macs", "--skip", "macs")


def test_write_renews_what_was_measured_and_keeps_the_rest(monkeypatch, tmp_path):
    out = tmp_path / "rows.jsonl"
    old = [row("step", 1.0), row("step", 1.0, case="gone"), row("step", 3.0, device="card"), row("macs", 7, "macs")]
    assert check(monkeypatch, tmp_path, {"step": Found([row("step", 9.0)])}, old, "--write", "--out", str(out)) == 0
    assert read(tmp_path / "baseline.jsonl") == [old[2], old[3], row("step", 9.0)]
    assert read(out) == [row("step", 9.0)]
    failing = {"step": Found([row("step", 11.0)], complaints=["no"])}
    assert check(monkeypatch, tmp_path, failing, None, "--write") == 1
    assert row("step", 9.0) in read(tmp_path / "baseline.jsonl"), "a failing run renews nothing"


def test_a_missing_baseline_is_said(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"baseline.jsonl: no such file"):
        check(monkeypatch, tmp_path, {"macs": Found()}, None)
    assert check(monkeypatch, tmp_path, {"macs": Found([row("macs", 1, "macs")])}, None, "--write") == 0
    assert read(tmp_path / "baseline.jsonl") == [row("macs", 1, "macs")]


def test_renewed_counts_threads_of_a_cpu_as_devices():
    one, two = row("step", 1.0, threads=1), row("step", 2.0, threads=2)
    assert renewed([one, two], [{**two, "value": 3.0}]) == [one, {**two, "value": 3.0}]


def test_the_gpu_part_is_about_this_very_card(monkeypatch):
    mine, other = row("step", 1.0, device="Card X", driver="580"), row("step", 1.0, device="Card Y", driver="580")
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card X")
    monkeypatch.setattr(bench_check, "run", lambda *arguments: asked.append(arguments) or [mine])
    assert [belongs(r, "gpu") for r in (mine, other)] == [True, False]
    assert not belongs(mine, "step"), "the CPU part has no business with it"
    settings = bench_check.Settings(rounds=7)
    assert bench_check.gpu(settings, [other]).rows == []
    assert "the baseline has no row of Card X" in bench_check.gpu(settings, [other]).notes[0]
    assert asked == []
    assert bench_check.gpu(settings, [mine, other]).rows == [mine]
    assert asked == [("step", "--device", "cuda", "--rounds", "7")]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_check.gpu(settings, [mine]).notes == ["gpu: not measured, this machine has no GPU"]


def test_rows_of_another_process(monkeypatch, tmp_path):
    def says(code):
        (tmp_path / "benchmarks").mkdir(exist_ok=True)
        (tmp_path / "benchmarks" / "__init__.py").touch()  # a folder alone loses against an installed package
        (tmp_path / "benchmarks" / "fake.py").write_text(code)
        return bench_check.run("fake", "--rounds", "3", threads=1)

    monkeypatch.setattr(bench_check, "ROOT", tmp_path)
    monkeypatch.setitem(bench_check.MODULES, "fake", "benchmarks.fake")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    ratio = row("step", 1.5, bench_check.RATIO)
    code = f"import os, sys; print('warming up'); print({json.dumps(json.dumps(ratio))})\n"
    assert says(
        code + "assert sys.argv[1:] == ['--json', '--rounds', '3'] and os.environ['OMP_NUM_THREADS'] == '1'"
    ) == [ratio]
    with pytest.raises(UserError, match=r"-m benchmarks.fake --json --rounds 3 ended with 2: error: no such flag"):
        says("import sys; print('Traceback\\nerror: no such flag', file=sys.stderr); sys.exit(2)")
    with pytest.raises(UserError, match="line 1: not JSON"):
        says("print('{\"suite\"')")


def test_the_step_part_keeps_the_ratio_and_wants_one(monkeypatch):
    rows = [row("step", 250.0), row("step", 1.1, bench_check.RATIO)]
    monkeypatch.setattr(bench_check, "run", lambda *arguments, threads: rows)
    assert bench_check.step(bench_check.Settings(), []).rows == rows[1:]
    rows.pop()
    with pytest.raises(UserError, match="printed no row of times_faster_than_released"):
        bench_check.step(bench_check.Settings(), [])


def tally(costs, *kinds):
    return sum(cost.kind in kinds for cost in costs)


@pytest.fixture(scope="module")
def sd21():
    """What `launches.on_meta` counts, once for all tests: seconds each."""
    return {name: launches.on_meta(structure(name)) for name in ("dense", "0.80")}


def test_launches_of_sd21_are_those_of_its_modules(sd21):
    with torch.device("meta"):
        unet = UNet(SD21)
    convs = sum(isinstance(m, nn.Conv2d) for m in unet.modules())
    norms = sum(isinstance(m, nn.GroupNorm | nn.LayerNorm) for m in unet.modules())
    found = sd21["dense"]
    # lower: teacher, student, and a backward pass; upper: teacher, and twice student and backward
    assert tally(found["lower"], "conv") == 3 * convs == 198
    assert tally(found["upper"], "conv") == 5 * convs
    assert tally(found["lower"], "norm") == 3 * norms
    cores = [cost for cost in found["lower"] if "dot_product" in cost.op]
    assert len(cores) == 3 * 2 * 16, "self- and cross-attention of 16 transformers"
    # narrower, not fewer: but widths that are no multiple of 8 are padded, forwards and backwards
    padding = [cost for cost in sd21["0.80"]["lower"] if cost.op in ("aten::constant_pad_nd", "aten::slice_backward")]
    assert len(sd21["0.80"]["lower"]) == len(found["lower"]) + len(padding) == len(found["lower"]) + 3 * 10
    in_rooms = {cost.room for costs in found.values() for cost in costs}
    assert in_rooms == {"diffusion", "teacher", "student", "losses", "backward", "optimizer"}


def test_the_data_room_is_not_counted():
    def step():
        with phase("data"):
            torch.ones(2) + 1
        with phase("student"):
            torch.ones(2) * 2

    assert {cost.op for cost in launches.count(step)} == {"aten::ones", "aten::mul"}
    assert {cost.room for cost in launches.count(step)} == {"student"}


def test_suites_are_made_by_modules_that_are_there():
    for module in bench_check.MODULES.values():
        assert callable(importlib.import_module(module).main)


def test_rows_and_table_of_counts_add_up():
    costs = launches.count(lambda: torch.ones(2, 2) @ torch.ones(2, 2))
    rows = launches.rows("a step", costs, "torch", {"unet": "u"}, {"device": "cpu"})
    values = {r["config"]["kind"]: r["value"] for r in rows}
    assert values == {"all": 3, "linear": 1, "pointwise": 2}
    lines = launches.table(rows).splitlines()
    assert lines[0].split() == ["launches", "per", "step", "all", "linear", "pointwise"]
    assert lines[1].split() == ["a", "step", "3", "1", "2"]


def test_the_committed_baseline_holds_for_what_is_quick(sd21, monkeypatch):
    """MACs and the launches of SD 2.1: the same on every machine."""
    monkeypatch.setattr(launches, "structure", lambda name: name)
    monkeypatch.setattr(launches, "on_meta", sd21.get)
    only = {"macs": bench_check.macs(bench_check.Settings(), []).rows}
    only["launches"] = launches.measure(torch.device("cpu"), "sd21")
    for suite, rows in only.items():
        found = [r for r in read(BASELINE) if r["suite"] == suite and not r["case"].startswith("mini")]
        if suite == "launches":
            of_this_torch(found)
        committed = {(r["case"], r["metric"], r["config"].get("kind")): r["value"] for r in found}
        assert committed == {(r["case"], r["metric"], r["config"].get("kind")): r["value"] for r in rows}


def test_the_committed_baseline_has_every_part():
    rows = read(BASELINE)
    assert {"macs", "launches", "step"} <= {r["suite"] for r in rows}
    assert {"mini lower", "mini upper"} <= {r["case"] for r in rows if r["suite"] == "launches"}
    assert all(r["metric"] == bench_check.RATIO for r in rows if r["suite"] == "step" and not r["driver"])


def test_the_workflow_names_what_exists():
    text = WORKFLOW.read_text()
    commands = re.findall(r"run: (.+)", text)
    makefile = (ROOT / "Makefile").read_text()
    targets = {target for command in commands for target in re.findall(r"make ([a-z-]+)", command)}
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), f"the Makefile has no target {target}"
    modules = [*re.findall(r"python3? -m ([\w.]+)", text), "benchmarks.pages.bench_check"]
    for module in modules:
        assert importlib.util.find_spec(module), module
    arguments = [part.split() for command in commands for part in re.findall(r'ARGS="(.*?)"', command)]
    assert arguments
    for words in arguments:
        bench_check.flags.parse(bench_check.Settings, "x", None, args=words)  # an unknown flag raises
    assert not re.search(r"https?://|[\w-]+\.(com|org|io|net)\b", text), "no host names"


def test_the_workflow_is_one():
    yaml = pytest.importorskip("yaml")
    flow = yaml.safe_load(WORKFLOW.read_text())
    assert flow[True] == "pull_request", "YAML 1.1 reads the key `on` as true; so does the reader of workflows' keys"
    assert set(flow["jobs"]) == {"cpu", "gpu"}
    for name, job in flow["jobs"].items():
        uses = [step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step]
        assert uses == ["actions/checkout", "actions/setup-python", "actions/upload-artifact"]
        assert job["steps"][1]["with"]["python-version"] == "3.12"
        (command,) = (step["run"] for step in job["steps"] if "run" in step)
        assert command.startswith("make bench-check")
        upload = job["steps"][-1]
        assert upload["if"] == "always()", "the rows are wanted above all when the check fails"
        assert upload["with"]["path"] in command, name
    assert flow["jobs"]["gpu"]["runs-on"] == ["self-hosted", "gpu"]
    assert "vars.HAS_GPU_RUNNER == 'true'" in flow["jobs"]["gpu"]["if"]
    assert "if" not in flow["jobs"]["cpu"]


def test_bad_flags_are_one_line():
    done = run_command(bench_check.main, "--onyl", "macs")
    assert (done.returncode, done.stderr) == (
        2,
        "error: there is no flag '--onyl'; did you mean '--only' or '--rounds' or '--out'?\n",
    )
