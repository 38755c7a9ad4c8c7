"""The latency benchmark of the UNet: what is compared, what is refused, and how a speedup is worked out."""

import json
import math
import os
import statistics
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import Timing, Unavailable
from benchmarks.speed import unet as bench
from benchmarks.speed import unet_providers, unet_sites
from benchmarks.structures import NAMES, model, structure
from bilevel_fast.base import errors
from bilevel_fast.base.devices import cpu_name
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import SD21, sites
from bilevel_fast.models.macs import count
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.graphs import WARMUP
from replay import on_the_cpu

CPU = torch.device("cpu")
MINI = model(tiny=True)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["unet", "--tiny", "--batch", "1", "--rounds", "4", *arguments])
    return errors.run(bench.main)


def mini(name="dense"):
    torch.manual_seed(0)
    return UNet(structure(name, True).config, structure(name, True)).eval()


# --- structures ---


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("name", ["0.80", "0.55"])
def test_a_ratio_is_what_the_name_says(name, tiny):
    size = model(tiny)
    kept = structure(name, tiny)
    assert count(kept, size.latent, size.text).ratio == pytest.approx(float(name), rel=0.005)
    counts = [(kept.count(site, w), w.units) for site in sites(kept.config) for w in site.widths]
    share = statistics.median(count / units for count, units in counts)
    assert all(abs(count - share * units) < 1.5 for count, units in counts), "the same, up to whole units"


def test_bk_sdm_has_the_published_sizes():
    """Parameters of the UNets in the authors' model card of BK-SDM-v2: billions, rounded up to a hundredth."""
    names = ("dense", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny")
    assert [math.ceil(count(structure(n), 64, 77).params / 1e7) for n in names] == [87, 59, 49, 33]


def test_tiny_structures_are_small_and_all_there():
    params = {name: count(structure(name, True), 16, 12).params for name in NAMES}
    assert params["bk-sdm-base"] == params["dense"] < 4e6
    assert params["dense"] > params["bk-sdm-small"] > params["bk-sdm-tiny"]


def test_a_name_that_there_is_not():
    with pytest.raises(UserError, match=r"^no structure '0.8'; did you mean '0.80'"):
        structure("0.8")


# --- providers ---


@pytest.mark.parametrize("name", ["dense", "0.55", "bk-sdm-tiny"])
def test_providers_agree_on_the_output(name):
    inputs = bench.make_inputs(MINI, 2, CPU, torch.float32)
    net = mini(name)
    expected = unet_providers.plain(net, inputs, "torch")()
    assert expected.shape == (2, 12, 16, 16)
    limit = unet_providers.bound(net, inputs)
    for provider in ("eager", "ours"):
        assert unet_providers.distance(unet_providers.PROVIDERS[provider](net, inputs)(), expected) <= limit, provider


def test_compile_is_one_graph_of_torch_ops(monkeypatch):
    seen = {}

    def compile(module, **options):
        seen.update(options)
        return torch._dynamo.optimize("eager", nopython=options["fullgraph"])(module)

    monkeypatch.setattr(torch, "compile", compile)
    inputs, net = bench.make_inputs(MINI, 1, CPU, torch.float32), mini("bk-sdm-tiny")
    out = unet_providers.PROVIDERS["compile"](net, inputs)()
    assert torch.equal(out, unet_providers.PROVIDERS["torch"](net, inputs)())
    assert seen == {"fullgraph": True, "dynamic": False}


def test_each_provider_says_which_ops_it_wants(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "native")
    seen = []

    class Spy:
        out = torch.zeros(1)

        def __call__(self, *inputs):
            seen.append(os.environ.get("BILEVEL_FAST_OPS"))
            return self

    inputs = (torch.zeros(1), torch.zeros(1), torch.zeros(1))
    for provider in ("torch", "ours"):
        unet_providers.PROVIDERS[provider](Spy(), inputs)()
    assert seen == ["torch", None]
    assert os.environ["BILEVEL_FAST_OPS"] == "native", "as it was"


def test_the_bound_is_what_rounding_does():
    net = mini().to(torch.bfloat16)
    limit = unet_providers.bound(net, bench.make_inputs(MINI, 1, CPU, torch.bfloat16))
    assert 0.005 < limit < 0.05  # bf16 keeps 8 bits: 1 part in 512 for each rounding, some sixty layers deep
    assert unet_providers.distance(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert unet_providers.distance(torch.tensor([math.nan]), torch.ones(1)) == math.inf
    assert unet_providers.distance(torch.ones(2), torch.ones(1)) == math.inf


def test_a_provider_that_computes_something_else_is_not_timed(monkeypatch):
    def wrong(net, inputs):
        x, t, text = inputs
        return unet_providers.plain(net, (x, t, text * 1.01), "torch")

    monkeypatch.setitem(unet_providers.PROVIDERS, "ours", wrong)
    settings = bench.Settings(tiny=True, batch=(1,), structures=("dense",), providers=("torch", "ours"), rounds=4)
    ((good, bad),) = bench.measure(settings)
    assert good["value"] > 0
    assert bad["value"] is None
    assert bad["reason"].startswith("computes something else: 0.0")


def test_a_graph_hands_out_what_the_replay_writes(monkeypatch):
    """With the recorder of the CPU: a replay computes anew, and writes where the recorded output lies."""
    with pytest.raises(Unavailable, match="CUDA graphs need CUDA"):
        unet_providers.graph(lambda: torch.zeros(1), CPU)
    monkeypatch.setattr(measure, "side_stream", lambda device: nullcontext())
    monkeypatch.setattr(measure, "cuda_recorder", lambda device: on_the_cpu)
    x, calls = torch.ones(3), []

    def call():
        calls.append(x.clone())
        return 2 * x

    replay = unet_providers.graph(call, torch.device("cuda"))
    assert len(calls) == WARMUP + 1
    x.fill_(5.0)
    assert replay().tolist() == [10.0] * 3
    assert replay() is replay()
    assert len(calls) == WARMUP + 1, "no Python runs"
    with pytest.raises(Unavailable, match="could not be captured in a CUDA graph"):
        unet_providers.graph(lambda: torch.full((), x.sum().item()), torch.device("cuda"))


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch):
    monkeypatch.setattr(measure, "side_stream", lambda device: nullcontext())
    for record in (None, on_the_cpu):
        call, done = measure.recorded(lambda: lambda: torch.ones(2).sum().item(), CPU, record)
        assert (call(), done) == (2.0, False)


# --- sites ---


def test_distinct_sites_are_all_sites():
    groups = unet_sites.shapes(SD21)
    assert sorted(s.name for same in groups for s in same) == sorted(s.name for s in sites(SD21))
    assert len(groups) == 18
    assert [s.name for s in groups[0]] == ["down_blocks.0.resnets.0", "down_blocks.0.resnets.1"]


def test_a_site_alone_gets_what_it_gets_in_the_unet():
    net = mini("0.55")
    seen = {}

    def note(name, module, args, out):
        seen[name] = [a if a is None else (a.shape, a.stride(), a.dtype) for a in args]

    for site in sites(net.config):
        net.get_submodule(site.name).register_forward_hook(partial(note, site.name))
    unet_providers.plain(net, bench.make_inputs(MINI, 2, CPU, torch.float32), "torch")()
    in_the_unet = dict(seen)
    for same in unet_sites.shapes(net.config):
        for site in same:
            unet_sites.call_of(net.get_submodule(site.name), same[0], MINI, 2, torch.empty(0))()
            assert seen[site.name] == in_the_unet[site.name]


def test_sites_by_the_command_line(monkeypatch, capsys):
    assert run(monkeypatch, "--sites", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    groups = unet_sites.shapes(MINI.config)
    assert len(rows) == len({row["case"] for row in rows}) == 4 * len(groups)
    assert all(0 < row["p20"] <= row["value"] <= row["p80"] for row in rows)
    first = [row["config"] for row in rows[:4]]
    assert [config["kept"] for config in first] == [{"groups": k} for k in (16, 12, 8, 4)]
    assert {name for row in rows for name in row["config"]["sites"]} == {site.name for site in sites(MINI.config)}


# --- timing ---


def subject(name, provider, seconds=None, **more):
    return bench.Subject(name, mini(name), provider, timing=None if seconds is None else Timing(tuple(seconds)), **more)


def test_realised_speedup_is_the_ratio_of_times_over_the_ratio_of_macs():
    # the machine is twice as slow in the second half; round by round 1.5, 1.5, 1.0, 1.0 and 1.2 times as fast
    dense = subject("dense", "ours", [3.0, 3.0, 6.0, 6.0, 6.0])
    pruned = subject("0.55", "ours", [2.0, 2.0, 6.0, 6.0, 5.0])
    rows = list(bench.rows_of([pruned, dense], MINI, 4))
    assert [(r["case"], r["metric"], r["unit"]) for r in rows] == [
        ("mini 0.55 b4", "ms", "ms"),
        ("mini 0.55 b4", "realised_speedup", "x"),
        ("mini dense b4", "ms", "ms"),
    ]
    assert [r["value"] for r in rows if r["metric"] == "ms"] == [5000.0, 6000.0]
    ratio = count(structure("0.55", True), 16, 12).true / count(structure("dense", True), 16, 12).true
    assert rows[1]["value"] == pytest.approx(1.2 * ratio)
    assert rows[1]["p20"] == pytest.approx(1.0 * ratio)
    assert rows[1]["p80"] == pytest.approx(1.5 * ratio)
    assert rows[1]["config"]["gmacs"] == pytest.approx(0.130658748)


def test_no_speedup_without_both_times():
    dense, pruned = subject("dense", "graphs", reason="CUDA graphs need CUDA"), subject("0.80", "graphs", [1.0, 1.0])
    speedup = list(bench.rows_of([dense, pruned], MINI, 1))[2]
    assert (speedup["metric"], speedup["value"]) == ("realised_speedup", None)
    assert speedup["reason"] == "dense: CUDA graphs need CUDA"
    alone = list(bench.rows_of([pruned], MINI, 1))
    assert [r["metric"] for r in alone] == ["ms"], "nothing to compare with was asked for"


def test_one_that_fails_in_the_middle_does_not_stop_the_others():
    calls = []

    def breaks():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of\n  luck")
        return torch.zeros(1)

    good = subject("dense", "torch", call=lambda: torch.zeros(1))
    bad = subject("dense", "ours", call=breaks)
    never = subject("dense", "graphs", reason="CUDA graphs need CUDA")
    bench.time_all([bad, good, never], 3, CPU)
    assert len(good.timing.seconds) == 3
    assert bad.timing is None
    assert bad.reason == "RuntimeError: out of luck"
    assert never.timing is None


# --- the committed rows ---


def test_check_names_what_fell_by_more_than_three_per_cent():
    def row(case, value, provider="ours", metric="realised_speedup"):
        return {"case": case, "provider": provider, "metric": metric, "value": value}

    then = [row("a", 1.0), row("b", 1.0), row("c", 1.0), row("d", None), row("e", 1.0), row("a", 9.0, "torch")]
    now = [row("a", 0.971), row("b", 0.969), row("c", None), row("d", 0.1), row("f", 0.1), row("a", 0.1, "torch")]
    assert bench.regressions(now, then) == [
        "b: realised speedup 0.969, was 1.000",
        "c: realised speedup not measured, was 1.000",
    ]
    with pytest.raises(UserError, match="nothing measured that the committed rows have"):
        bench.regressions([row("f", 1.0)], then)


def test_check_reads_the_rows_of_this_machine(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    arguments = ("--structures", "dense", "0.55", "--providers", "ours", "--check")
    assert run(monkeypatch, *arguments) == 2
    assert f"benchmarks/results has no rows of this machine ({cpu_name()})" in capsys.readouterr().err
    impossible = {
        "suite": "unet",
        "device": cpu_name(),
        "case": "mini 0.55 b1",
        "provider": "ours",
        "metric": "realised_speedup",
        "value": 1e3,
    }
    other = json.dumps(impossible | {"device": "another"}) + "\n" + json.dumps(impossible | {"suite": "another"}) + "\n"
    (tmp_path / "other.jsonl").write_text(other)
    assert run(monkeypatch, *arguments) == 2, "of another machine, of another benchmark"
    capsys.readouterr()
    (tmp_path / "unet_cpu.jsonl").write_text(json.dumps(impossible) + "\n")
    with pytest.raises(SystemExit, match=r"mini 0.55 b1: realised speedup .*, was 1000.000"):
        run(monkeypatch, *arguments)
    (tmp_path / "unet_cpu.jsonl").write_text(json.dumps(impossible | {"value": 1e-3}) + "\n")
    assert run(monkeypatch, *arguments) == 0


# --- command line ---


def test_rows_are_appended_and_the_missing_say_why(monkeypatch, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    out.write_text('{"old": 1}\n')
    arguments = ("--structures", "dense", "0.80", "--providers", "eager", "graphs", "ours", "--out", str(out))
    assert run(monkeypatch, *arguments, "--json") == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    old, *rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert old == {"old": 1}
    assert rows == printed
    got = {(r["config"]["structure"], r["provider"], r["metric"]): r for r in rows}
    assert len(rows) == len(got) == 9
    timed = {key for key, r in got.items() if r["value"] is not None and r["provider"] != "graphs"}
    names = ("eager", "ours")
    assert timed == {(s, p, "ms") for s in ("dense", "0.80") for p in names} | {
        ("0.80", p, "realised_speedup") for p in names
    }
    if not torch.cuda.is_available():
        assert got["dense", "graphs", "ms"]["reason"] == "CUDA graphs need CUDA"
    for field in ("p20", "p80", "device", "torch", "triton", "commit", "date", "dtype", "load"):
        assert got["0.80", "ours", "ms"][field], field
    assert got["dense", "ours", "ms"]["config"]["ops"], "the table that `ours` went by"


def test_planned_structures_are_timed_by_name(monkeypatch, capsys):
    """Their MACs are those that `structure` says, not those of the even cut."""
    names = ("dense", "planned-0.80", "planned-0.55")
    assert run(monkeypatch, "--structures", *names, "--providers", "torch", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    timed = {row["config"]["structure"]: row["config"]["gmacs"] for row in rows if row["metric"] == "ms"}
    assert timed == {name: count(structure(name, True), 16, 12).true / 1e9 for name in names}
    assert [row["config"]["structure"] for row in rows if row["metric"] == "realised_speedup"] == list(names[1:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--provider", "ours"], "there is no flag '--provider'; did you mean '--providers'"),
        (["--providers", "our"], "--providers our: there is none of that name; did you mean 'ours'"),
        (["--structures", "bk-sdm-bass"], "did you mean 'bk-sdm-base'"),
        (["--structures", "planned-0.8"], "did you mean 'planned-0.80'"),
        (["--structures", "dense", "dense"], "--structures: wanted at least one name, and each of them once"),
        (["--batch", "0"], "--batch 0: wanted positive numbers of images"),
        (["--rounds", "3"], "--rounds 3: wanted at least 4"),
        (["--align", "0"], "--align 0: wanted at least 1"),
        (["--check", "--sites"], "--check compares whole UNets, it cannot go with --sites"),
        (["--check", "--structures", "0.80"], "--check needs the structure dense and the provider ours"),
    ],
)
def test_bad_flags_are_one_line(monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    if not torch.cuda.is_available():
        assert run(monkeypatch, "--device", "cuda") == 2
