"""Rows of the roofline model site by site: what a plan costs by them is what its sites cost one by one."""

import json
import random

import pytest
import torch

from benchmarks import RESULTS
from benchmarks.cards import CARDS
from benchmarks.counts import roofline_sites
from benchmarks.counts.roofline import seconds
from benchmarks.speed import unet_sites
from benchmarks.structures import model, structure
from bilevel_fast import prune
from bilevel_fast.base import errors
from bilevel_fast.models.architecture import MINI, SD21, sites
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.macs import count, site_costs
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.profiling.cost import Counter
from bilevel_fast.pruning import LatencyBudget, read_latencies
from bilevel_fast.pruning.planner import spend
from planning import ones
from releases import of_this_torch

COMMITTED = RESULTS / "sites_roofline_a6000.jsonl"
A6000 = CARDS["RTX A6000"]


def ms(site, kept, size, batch=2):
    costs = roofline_sites.costs(site, kept, size, batch)
    return 1e3 * sum(max(c.flops / A6000.matmul, c.bytes / A6000.bytes_per_s) for c in costs)


@pytest.fixture
def run(monkeypatch, capsys):
    def command(module, *arguments):
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        return errors.run(module.main), *capsys.readouterr()

    return command


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """The file for the mini world; rows are of torch's ops, whatever the environment wants."""
    path = tmp_path_factory.mktemp("rows") / "sites.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["roofline_sites", "--card", "a6000", "--tiny", "--out", str(path)])
        patch.setenv("BILEVEL_FAST_OPS", "triton")
        assert errors.run(roofline_sites.main) == 0
    return path


def test_any_counts_cost_what_they_cost_alone(mini):
    """Rows along one path say the time of every combination of counts, those left out included."""
    table, rng = read_latencies(mini, MINI), random.Random(0)
    for same in unet_sites.shapes(MINI):
        for _ in range(6):
            kept = {w.name: rng.randint(1, w.units) for w in same[0].widths}
            wanted = ms(same[0], kept, model(tiny=True))
            assert [table[site.name].ms(kept) for site in same] == pytest.approx([wanted] * len(same), rel=1e-6)


def test_committed_rows():
    """All sites of SD 2.1; two of them projected again, and every number within reach of what those say."""
    rows = [json.loads(line) for line in COMMITTED.read_text().splitlines()]
    assert {row["device"] for row in rows} == {"RTX A6000"}
    assert all(row["projection"] is True and row["metric"] == "projection" for row in rows)
    assert {name for row in rows for name in row["config"]["sites"]} == {site.name for site in sites(SD21)}
    of_this_torch(rows)
    by_site = {}
    for row in rows:
        by_site.setdefault(row["config"]["sites"][0], []).append((row["config"]["kept"], row["value"]))
    for same in unet_sites.shapes(SD21):
        if same[0].name in ("down_blocks.0.resnets.0", "down_blocks.1.attentions.0"):
            found = roofline_sites.times(same[0], model(), 2, A6000)
            assert [kept for kept, _ in found] == [kept for kept, _ in by_site[same[0].name]]
            assert [t for _, t in found] == pytest.approx([t for _, t in by_site[same[0].name]], rel=1e-9)


def test_plans_by_the_committed_table():
    """A plan of SD 2.1 takes what its 38 sites take one by one, and no more than its budget."""
    table = read_latencies(COMMITTED, SD21)
    assert table.settings == "batch 2, latent 64, text 77, align 8, RTX A6000, projection"
    budget = LatencyBudget(0.8, table)
    plan, prices = spend(SD21, budget, ones(SD21)), budget.prices(SD21)
    taken = prices.of(plan) / prices.dense
    assert 0.798 < taken <= 0.8
    assert count(plan, 64, 77).ratio < 0.79, "time falls more slowly than MACs: norms and projections stay"
    of_this_torch(map(json.loads, COMMITTED.read_text().splitlines()))
    for found in (plan, structure("planned-0.55")):
        alone = sum(ms(s, {w.name: found.count(s, w) for w in s.widths}, model()) for s in sites(SD21))
        assert prices.of(found) / 1e9 == pytest.approx(alone, rel=1e-6)


def test_products_are_those_of_the_mac_count():
    """Multiply-adds of a site alone, against the counter of MACs: 2 images, no padding at these counts."""
    size = model()
    costs = site_costs(SD21, size.latent, size.text)
    for same in unet_sites.shapes(SD21):
        kept = {w.name: w.units if w.name != "groups" else 24 for w in same[0].widths}
        flops = sum(cost.flops for cost in roofline_sites.costs(same[0], kept, size, 2))
        assert flops == 2 * 2 * costs[same[0].name].total(kept).products


def test_the_sites_are_most_of_the_unet():
    """Alone they run the very ops that they run in the UNet: what is left are its own convolutions and the skips."""
    size, kept = model(tiny=True), Structure.uniform(MINI, 0.5)
    with torch.device("meta"):
        unet = UNet(MINI, kept, roofline_sites.ALIGN).bfloat16()
        inputs = (torch.empty(2, 12, 16, 16), torch.zeros(2, dtype=torch.int64), torch.empty(2, 12, 64))
    with torch.no_grad(), Counter() as counter:
        unet(*inputs)
    alone = [
        cost
        for site in sites(MINI)
        for cost in roofline_sites.costs(site, {w.name: kept.count(site, w) for w in site.widths}, size, 2)
    ]
    inside = [(c.op, c.flops, c.bytes) for c in counter.costs]
    for cost in alone:
        inside.remove((cost.op, cost.flops, cost.bytes))
    left = {"convolution" if "conv" in op else op for op, flops, _ in inside if flops}
    assert left <= {"convolution", "aten::addmm", "aten::mm"}
    total = sum(seconds(c, A6000.matmul, A6000.bytes_per_s) for c in counter.costs)
    assert sum(seconds(c, A6000.matmul, A6000.bytes_per_s) for c in alone) > 0.5 * total


def test_prune_reads_them(mini, run, tmp_path):
    out = tmp_path / "student"
    code, stdout, _ = run(prune, "magnitude", "--latency", mini, "--budget", 0.9, "--out", out)
    assert code == 0
    found, prices = load_folder(out).structure, LatencyBudget(0.9, read_latencies(mini, MINI)).prices(MINI)
    assert found is not None
    assert f"{prices.of(found) / prices.dense:.4f}, budget 0.9\n" in stdout
    assert "batch 2, latent 16, text 12, align 8, RTX A6000, projection\n" in stdout


def test_rows_are_printed_without_a_file(run, monkeypatch):
    monkeypatch.setattr(roofline_sites, "shapes", lambda config: unet_sites.shapes(config)[:1])
    code, out, _ = run(roofline_sites, "--card", "H200", "--tiny", "--batch", 3)
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert {row["config"]["batch"] for row in rows} == {3}
    assert {row["command"] for row in rows} == {
        "python -m benchmarks.counts.roofline_sites --card 'H200' --batch 3 --tiny"
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--card", "h2oo"), "--card h2oo: 0 cards of that name"),
        (("--card", "rtx"), "--card rtx: 3 cards of that name"),
        (("--card", "h200", "--batch", 0), "--batch 0, wanted at least 1"),
    ],
)
def test_refusals(run, arguments, message):
    code, out, err = run(roofline_sites, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
