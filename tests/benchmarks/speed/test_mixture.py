"""The benchmark of a mixture batch: what is compared computes the same, and its rows say what was measured."""

import json

import pytest
import torch

from benchmarks.measure import Timing
from benchmarks.speed import mixture
from benchmarks.speed.unet import make_inputs
from benchmarks.structures import model
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.macs import count
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning.aptp.mixed import Mix

CPU = torch.device("cpu")


def test_the_experts_differ_and_are_on_the_budget():
    size = model(tiny=True)
    structures = mixture.make_experts(size, 0.55, 3)
    assert all(abs(count(s, size.latent, size.text).ratio - 0.55) < 0.002 for s in structures)
    assert len({json.dumps(s.to_dict()) for s in structures}) == 3
    assert any(s.dropped for s in structures)


def test_all_ways_but_dense_compute_the_same():
    """With an expert that no row is for."""
    size = model(tiny=True)
    torch.manual_seed(0)
    unet, expert = UNet(size.config).eval().requires_grad_(False), torch.tensor([2, 0, 2])
    inputs = make_inputs(size, 3, CPU, torch.float32)
    calls = mixture.calls(unet, mixture.make_experts(size, 0.8, 3), expert, inputs)
    found = {name: call() for name, call in calls.items()}
    assert list(found) == ["mixed", "alone", "masks", "dense"]
    assert torch.allclose(found["mixed"], found["alone"], atol=1e-5)
    assert torch.allclose(found["mixed"], found["masks"], atol=1e-5)
    assert (found["mixed"] - found["dense"]).abs().max() > 0.01


def test_rows(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.jsonl"
    flags = ["--tiny", "--experts", "2", "--batch", "2", "--budget", "0.55", "--rounds", "4", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["mixture", *flags])
    mixture.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(capsys.readouterr().out.splitlines()) == len(rows) == 7
    ms = {row["provider"]: row for row in rows if row["metric"] == "ms"}
    ratios = {row["provider"]: row for row in rows if row["metric"] == "mixed_times_faster"}
    assert list(ms) == ["mixed", "alone", "masks", "dense"]
    assert list(ratios) == ["alone", "masks", "dense"]
    assert all(row["p20"] <= row["value"] <= row["p80"] for row in rows)
    assert all(row["config"]["error"] <= row["config"]["bound"] for row in rows)
    params = {name: row["config"]["params"] for name, row in ms.items()}
    assert (
        params["mixed"]
        == params["masks"]
        == params["dense"]
        == sum(p.numel() for p in UNet(model(True).config).parameters())
    )
    assert 0.5 < params["alone"] / params["mixed"] < 2  # two experts of about half


def test_the_ratio_is_how_much_less_time_mixed_takes(monkeypatch):
    times = {"mixed": 2.0, "alone": 3.0, "masks": 4.0, "dense": 1.0}
    timed = {name: Timing((seconds,) * 4) for name, seconds in times.items()}
    monkeypatch.setattr(mixture, "interleaved", lambda *_, **__: timed)
    settings = mixture.Settings(tiny=True, experts=1, batch=(1,), budget=(0.8,))
    rows = {row["provider"]: row["value"] for row in mixture.measure(settings) if row["metric"] != "ms"}
    assert rows == {"alone": 1.5, "masks": 2.0, "dense": 0.5}


def test_what_computes_something_else_is_not_timed(monkeypatch):
    bind = Mix.bind
    monkeypatch.setattr(Mix, "bind", lambda self, unet, expert: bind(self, unet, (expert + 1) % 2))
    with pytest.raises(UserError, match="away from their experts'"):
        list(mixture.measure(mixture.Settings(tiny=True, experts=2, batch=(2,), rounds=4)))


@pytest.mark.parametrize("flags", [["--experts", "0"], ["--batch", "0"], ["--rounds", "3"]])
def test_refusals(flags, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mixture", "--tiny", *flags])
    with pytest.raises(UserError, match="want positive numbers, --rounds at least 4"):
        mixture.main()
