"""`benchmarks.counts.fits` on the mini world's UNet: each row by the planner of a run; and the committed rows."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import RESULTS, structures
from benchmarks.counts import fits
from bilevel_fast.runs.config import preset
from bilevel_fast.runs.fitting import Fitting

GIB = 2**30
SMALL, STUDENT = structures.model(tiny=True), structures.structure("0.55", tiny=True)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(fits, "counted", lambda unet: (SMALL, {"0.55": STUDENT}))
    monkeypatch.setattr(fits, "SIZES", {1: GIB + fits.ENCODERS, 2: int(1.3 * GIB) + fits.ENCODERS})
    monkeypatch.setattr(fits, "RANKS", (1, 4))


def test_rows_are_what_a_run_decides(small, command):
    code, out, err = command(fits.main, "--json")
    assert (code, err) == (0, "")
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == 2 * (1 + 2 * 2)
    paper = preset("paper")
    for row in found:
        recompute = row["config"]["recompute"]
        plan = Fitting(replace(paper, recompute=recompute), STUDENT, SMALL.latent, SMALL.text, torch.bfloat16)
        if row["unit"] == "GiB":
            assert row["value"] == pytest.approx(sum(row["parts_gib"].values()))
            assert row["value"] * GIB == pytest.approx(plan.wanted(64, 1).total)
            continue
        shared = replace(plan.config, scale=replace(paper.scale, leaves=row["ranks"]))
        plan, card = replace(plan, config=shared, ranks=row["ranks"]), {"1 GB card": GIB, "2 GB card": int(1.3 * GIB)}
        wanted = 0 if row["device"] == "1 GB card" else plan.micro_batches(card[row["device"]])[0]
        assert row["value"] == wanted, "what CUDA takes alone is 1 GiB"
    assert {row["value"] for row in found if row["device"] == "2 GB card"} > {16}
    code, out, _ = command(fits.main)
    lines = out.splitlines()
    assert code == 0
    assert lines[1].split()[-4:] == ["1", "GB", "2", "GB"]
    assert lines[2].split()[0] == "0.55"
    assert lines[2].split()[2] == "-"


def test_a_cell_names_the_fewest_cards():
    assert fits.cell({1: 4, 2: 8}) == "4"
    assert fits.cell({8: 3, 4: 2, 1: 0, 2: 0}) == "4 cards: 2"
    assert fits.cell({1: 0, 8: 0}) == "-"


def test_a_preset_that_does_not_exist(command):
    code, _, err = command(fits.main, "--preset", "papr")
    assert (code, err.count("\n")) == (2, 1)
    assert "preset 'papr' does not exist; did you mean 'paper'" in err


def test_committed_rows():
    """Launches agree with the ops that were projected; a larger card, or more of them, is never worse."""
    rows = [json.loads(line) for line in (RESULTS / "sdxl.jsonl").read_text().splitlines()]
    suites = {name: [row for row in rows if row["suite"] == name] for name in ("launches", "roofline", "fits")}
    assert sum(map(len, suites.values())) == len(rows)
    assert {row["config"]["unet"] for row in rows} == {"sdxl"}
    assert all(row["projection"] for name in ("roofline", "fits") for row in suites[name])
    projected = {
        f"sdxl {r['config']['structure']} {r['case']}": r for r in suites["roofline"] if r["provider"] == "torch"
    }
    counts = {row["case"]: row["value"] for row in suites["launches"] if row["config"]["kind"] == "all"}
    assert len(counts) == 4
    assert all(projected[case]["launches"] == number for case, number in counts.items())
    found = {(r["case"], r["ranks"], r["device"]): r["value"] for r in suites["fits"] if r["unit"] == "images"}
    cards = [f"{size} GB card" for size in fits.SIZES]
    for (case, ranks, device), images in found.items():
        larger = cards[cards.index(device) + 1 :]
        assert all(found[case, ranks, card] >= images for card in larger)
        assert not images or all(found[case, more, device] for more in fits.RANKS if more > ranks)
        recomputed = found.get((f"{case}, recompute", ranks, device))
        assert recomputed is None or recomputed >= images
    assert len(found) == 4 * 2 * len(fits.RANKS) * len(cards)
