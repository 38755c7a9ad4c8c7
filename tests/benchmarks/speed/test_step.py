"""The step's benchmark: everybody computes the same, the numbers follow from the times, failures leave a row."""

import dataclasses
import json
import weakref
from functools import partial

import pytest
import torch

from benchmarks import cards, structures
from benchmarks.measure import Timing, interleaved
from benchmarks.speed import peers, step
from benchmarks.speed.ours import beside, ladder, ours, warm_up
from benchmarks.structures import Model, structure
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.macs import count
from commands import run_command
from mini_folder import TRAINED

CPU = torch.device("cpu")
SIZE = Model("mini", TRAINED, 16, 12)
QUICK = step.Settings(batch=1, rounds=3, structure="planned-0.55")  # odd: a median is one of the times
QUICKEST = dataclasses.replace(QUICK, rounds=2)


@pytest.fixture(autouse=True, scope="module")
def small():
    """Times are not looked at here: no warm-up, and UNets of two levels, in which every kind of block is."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (structures, step):
            patch.setattr(module, "model", lambda tiny=False: SIZE)
        structure.cache_clear()
        patch.setattr(step, "interleaved", partial(interleaved, warmup=0))
        patch.setattr(cards, "this_machine", partial(cards.this_machine, seconds=0.05))
        yield
    structure.cache_clear()


@pytest.fixture(scope="module")
def inputs():
    return step.make_inputs(SIZE, structure("0.80", tiny=True), batch=2)


@pytest.fixture(scope="module")
def rows():
    return list(step.measure(dataclasses.replace(QUICK, ladder=True)))


def test_every_rung_computes_the_same_steps(inputs):
    """Also in the second step, which has moved by what the first one learnt."""
    inputs = dataclasses.replace(inputs, lr=(1e-3, 1e-3))
    rungs = [*ladder(CPU), *beside(CPU)]
    found = []
    for rung in rungs:
        peer = ours(inputs, CPU, rung)
        found.append([call().item() for _ in range(2) for call in (peer.lower, peer.upper)])
    eager = peers.eager(inputs, CPU, dtype=torch.float32)
    found.append([call().item() for _ in range(2) for call in (eager.lower, eager.upper)])
    assert len(rungs) == 3
    for losses in found:
        assert losses == pytest.approx(found[0], rel=1e-3)
    assert found[0][0] != pytest.approx(found[0][2], rel=1e-3), "the steps must move something"


def test_rows(rows):
    """Who, what, how fast, how many launches; and speed is 1 / time."""
    seen = {(row["case"], row["provider"], row["config"]["rung"], row["metric"]): row for row in rows}
    contenders = [("ours", "kernels"), ("ours", "engine"), ("ours", "recompute"), ("eager", "eager")]
    contenders += [("released", "as released"), ("released", "no anomaly mode")]
    for provider, rung in contenders:
        for case in ("lower", "upper"):
            ms, speed = (seen[case, provider, rung, metric] for metric in ("ms", "images_per_second"))
            assert ms["value"] * speed["value"] == pytest.approx(1000, rel=1e-6)
            assert ms["p20"] <= ms["value"] <= ms["p80"]
            assert 0 < seen[case, provider, rung, "mfu"]["value"] < 1.5
            assert seen[case, provider, rung, "launches"]["value"] > 150
    ratios = {row["metric"] for row in rows if row["metric"].startswith("times_faster_than")}
    assert ratios == {f"times_faster_than_{name}" for name in
                      ("released", "released_no_anomaly_mode", "eager", "ours_engine", "ours_recompute")}  # fmt: skip
    assert all(row["suite"] == "step" and row["device"] and row["commit"] for row in rows)


def test_anomaly_mode_is_what_releases_most_launches(rows):
    by = {r["config"]["rung"]: r["value"] for r in rows if r["metric"] == "launches" and r["case"] == "lower"}
    assert by["as released"] > 2 * by["no anomaly mode"] > 2 * by["kernels"] * 0.9


def test_products_count_what_a_step_multiplies(inputs):
    size, kept = SIZE, structure("0.80", tiny=True)
    dense, student = (2 * count(s, 16, 12).true * 2 for s in (structure("dense", tiny=True), kept))
    assert step.products(size, kept, 2, "lower", "ours") == dense + 3 * student
    assert step.products(size, kept, 2, "upper", "ours") == 2 * dense + 6 * student
    assert step.products(size, kept, 2, "upper", "released") == 2 * dense + 3 * student


def test_who_computes_something_else_is_not_timed(monkeypatch):
    real = peers.released

    def wrong(inputs, *args, **kwargs):
        weights = dataclasses.replace(inputs.weights, feature=0.2)
        return real(dataclasses.replace(inputs, weights=weights), *args, **kwargs)

    monkeypatch.setattr(peers, "released", wrong)
    rows = list(step.measure(QUICKEST))
    (row,) = [row for row in rows if row["provider"] == "released"]
    assert row["value"] is None
    assert "its first lower loss is" in row["reason"]
    assert "not measured: as released: its first lower loss" in step.text(row)
    assert any(row["provider"] == "eager" and row["value"] for row in rows), "the others are timed all the same"
    assert any(row["provider"] == "ours" and row["metric"] == "ms" for row in rows)


def test_who_runs_out_of_memory_takes_nobody_along(monkeypatch):
    reason = "CUDA out of memory. Tried to allocate 9 GiB"

    def broken(*_, **__):
        raise torch.OutOfMemoryError(reason)

    monkeypatch.setattr(peers, "eager", broken)
    rows = list(step.measure(QUICKEST))
    assert [row["reason"] for row in rows if row["provider"] == "eager"] == [reason]
    assert any(row["provider"] == "released" and row["value"] for row in rows)


def test_a_peer_is_gone_before_the_next_is_built(monkeypatch):
    """On a GPU two of them would be 33 GiB beside ours. Their steps are what holds the memory."""
    alive = []

    def build(*_, **__):
        assert [call() for call in alive] == [None] * len(alive)
        peer = peers.Peer("small", lambda: torch.zeros(()), lambda: torch.zeros(()))
        alive.extend(weakref.ref(call) for call in (peer.lower, peer.upper))
        return peer

    for name in ("released", "eager"):
        monkeypatch.setattr(peers, name, build)
    monkeypatch.setattr(step, "check", lambda *_: None)
    assert all(row["value"] is not None for row in step.measure(QUICKEST))
    assert len(alive) == 4


def test_timings_in_other_units():
    timing = Timing((0.1, 0.2, 0.4))
    assert timing.map(lambda s: 16 / s).p50 == 80
    assert timing.map(lambda s: 16 / s).p20 <= 80 <= timing.map(lambda s: 16 / s).p80


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("planned-0.5", "no structure 'planned-0.5'; did you mean 'planned-0.55'"),
        ("bk-sdm-small", "--structure bk-sdm-small is a UNet of its own, wanted one that is cut from the teacher"),
    ],
)
def test_a_student_that_is_no_cut_is_one_line(name, message):
    with pytest.raises(UserError, match=message):
        next(step.measure(step.Settings(structure=name)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_one_line():
    with pytest.raises(UserError, match="--device cuda: this machine has no GPU"):
        next(step.measure(step.Settings(device="cuda")))


def test_command_line(tmp_path):
    out = tmp_path / "rows.jsonl"
    flags = ("--batch", 1, "--rounds", 2, "--peers", "released", "--json", "--out", out, "--check")
    result = run_command(step.main, *flags)
    assert result.returncode in (0, 1), result.stderr  # 1 if ours was slower in these two rounds
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    assert printed == [json.loads(line) for line in out.read_text().splitlines()]
    ratio = next(r["value"] for r in printed if r["metric"] == "times_faster_than_released" and r["case"] == "lower")
    assert (result.returncode == 1) == (ratio < 1)
    typo = run_command(step.main, "--bath", 1)
    assert typo.returncode == 2
    assert "there is no flag '--bath'; did you mean '--batch'" in typo.stderr


def test_warm_up_gives_the_first_losses(inputs):
    peer = ours(inputs, CPU, ladder(CPU)[0])
    wanted = ours(inputs, CPU, ladder(CPU)[0])
    assert warm_up(peer) == (wanted.lower().item(), wanted.upper().item())
