"""Latency budgets: `spend` is optimal for times of any kind, and a table says what was measured."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression

from benchmarks.speed.unet_sites import shapes, site_rows
from benchmarks.structures import model
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import MINI, sites
from bilevel_fast.models.macs import site_costs
from bilevel_fast.pruning.latency import LatencyBudget, SiteLatency, read_latencies
from bilevel_fast.pruning.planner import spend
from planning import MICRO, MICRO_DROPS, best_by_brute_force, depth_sites, objective, ones, random
from planning import timed_row as row

FIRST = "down_blocks.0.resnets.0"


def micro_rows():
    """Each site of the micro UNet at all and at half of its units."""
    for i, site in enumerate(sites(MICRO)):
        for share, ms in ((1, 5.0 + i), (2, 3.0 + i)):
            yield row(site.name, {w.name: w.units // share for w in site.widths}, ms)


@pytest.fixture
def write(tmp_path):
    def command(rows):
        path = tmp_path / "sites.jsonl"
        path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in rows))
        return path

    return command


@pytest.mark.parametrize("seed", range(4))
def test_latency_equals_brute_force(seed):
    """Times that jump, and that at some counts fall when more is kept: a card that likes round widths."""
    rng = np.random.default_rng(seed)
    table = {
        s.name: SiteLatency(rng.random(), {w.name: tuple(rng.random(w.units + 1).cumsum() + rng.random(w.units + 1))
                                           for w in s.widths}) for s in sites(MICRO)
    }  # fmt: skip
    dense = sum(table[s.name].ms({w.name: w.units for w in s.widths}) for s in sites(MICRO))
    importance = random(MICRO, seed, MICRO_DROPS)
    structure = spend(MICRO, LatencyBudget(0.7, table, min_keep=0.5), importance, droppable=MICRO_DROPS)
    taken = sum(table[n].ms({w: len(k) for w, k in widths.items()}) for n, widths in structure.kept.items())
    assert taken <= 0.7 * dense
    best = best_by_brute_force(importance, lambda s, kept: table[s].ms(kept), 0.7 * dense)
    assert objective(structure, importance) == pytest.approx(best, abs=1e-12)


def test_a_site_that_is_quicker_with_all_its_units(write):
    """Rows of ResNets are kept as they are, so units can take less than none; the plan is still the best there is."""
    rows = [{**x, "value": 4.0} if x["config"]["kept"] == {"groups": 4} else x for x in micro_rows()]
    rows += [row(s.name, {"groups": 3}, 9.0) for s in sites(MICRO) if s.kind == "resnet"]
    table = read_latencies(write(rows), MICRO)
    assert table[FIRST].ms({"groups": 3}) == 9.0 > table[FIRST].ms({"groups": 4}) == 4.0
    assert min(min(table[s.name].widths["groups"]) for s in sites(MICRO) if s.kind == "resnet") < 0
    budget = LatencyBudget(0.9, table, min_keep=0.5)
    assert all((p[1:] >= 0).all() for site in budget.prices(MICRO).sites.values() for p in site.widths.values())
    dense = sum(table[s.name].ms({w.name: w.units for w in s.widths}) for s in sites(MICRO))
    for droppable in ((), MICRO_DROPS):
        importance = random(MICRO, 3, MICRO_DROPS)
        structure = spend(MICRO, budget, importance, droppable=droppable)
        taken = sum(table[n].ms({w: len(k) for w, k in widths.items()}) for n, widths in structure.kept.items())
        assert budget.prices(MICRO).of(structure) == pytest.approx(taken * 1e9, abs=20)
        assert taken <= 0.9 * dense
        if droppable:
            best = best_by_brute_force(importance, lambda s, kept: table[s].ms(kept), 0.9 * dense)
            assert objective(structure, importance) == pytest.approx(best, abs=1e-12)


def test_reads_what_the_benchmark_writes(write):
    """Rows as timed: at each measured count the table says what was measured, for every site of that shape, but for
    Transformers that were slower when narrower: noise, that is averaged out."""
    rows = [row for some in site_rows(model(tiny=True), 1, 2, 1, torch.empty(0)) for row in some]
    table = read_latencies(write(rows), MINI)
    assert set(table) == {site.name for site in sites(MINI)}
    for same in shapes(MINI):
        mine = [row for row in rows if same[0].name in row["config"]["sites"]]
        mine.sort(key=lambda row: row["config"]["keep"])
        wanted = [row["value"] for row in mine]
        if same[0].kind == "transformer":
            wanted = isotonic_regression(wanted).x
        for site in same:
            assert [table[site.name].ms(row["config"]["kept"]) for row in mine] == pytest.approx(wanted, rel=1e-9)
    dense = sum(table[s.name].ms({w.name: w.units for w in s.widths}) for s in sites(MINI))
    importance = random(MINI, 0, depth_sites(MINI))
    structure = spend(MINI, LatencyBudget(0.8, table), importance, droppable=depth_sites(MINI))
    taken = sum(table[n].ms({w: len(k) for w, k in widths.items()}) for n, widths in structure.kept.items())
    assert 0.75 * dense < taken <= 0.8 * dense


def test_interpolates_and_promises_nothing_beyond_what_was_measured(write):
    rows = [*micro_rows(), row("up_blocks.0.resnets.1", {"groups": 3}, 7.9)]
    table = read_latencies(write(rows), MICRO)
    groups = [table["down_blocks.0.resnets.0"].ms({"groups": k}) for k in range(1, 5)]
    assert groups == pytest.approx([3.0, 3.0, 4.0, 5.0])
    index = [s.name for s in sites(MICRO)].index("up_blocks.0.resnets.1")
    groups = [table["up_blocks.0.resnets.1"].ms({"groups": k}) for k in range(1, 5)]
    assert groups == pytest.approx([3.0 + index, 3.0 + index, 7.9, 5.0 + index])


def test_a_transformer_that_is_slower_when_narrower_is_noise(write):
    """5 ms with all and 6 ms with half of its units are 5.5 ms either way; the time of no combination falls below."""
    name = "down_blocks.0.attentions.0"
    rows = [
        x if x["config"]["sites"] != [name] else {**x, "value": 5.0 + (x["config"]["kept"]["ff"] == 2)}
        for x in micro_rows()
    ]
    timed = read_latencies(write(rows), MICRO)[name]
    for kept in ((1, 1, 2), (2, 1, 2), (1, 2, 4), (2, 2, 4)):
        assert timed.ms(dict(zip(("attn1", "attn2", "ff"), kept, strict=True))) == pytest.approx(5.5)


def test_divides_what_a_transformer_saves_by_macs(write):
    """2 ms between (1, 1, 2) and (2, 2, 4): attn1, attn2 and ff save what share of those MACs is theirs."""
    name = "down_blocks.0.attentions.0"
    timed = read_latencies(write(micro_rows()), MICRO)[name]
    units = {w: c.true for w, c in site_costs(MICRO, 8, 5)[name].units.items()}
    given_up = {"attn1": units["attn1"], "attn2": units["attn2"], "ff": 2 * units["ff"]}
    full = {"attn1": 2, "attn2": 2, "ff": 4}
    for width, macs_given_up in given_up.items():
        saved = timed.ms(full) - timed.ms({**full, width: full[width] // 2})
        assert saved == pytest.approx(2.0 * macs_given_up / sum(given_up.values()))


@pytest.mark.parametrize(
    ("extra", "batch", "message"),
    [
        (["no json"], None, "sites.jsonl line 13 is not JSON"),
        (["[1]"], None, "sites.jsonl line 13: wanted a JSON object, found list"),
        ([{"suite": "unet_sites", "value": 1.0}], None, "sites.jsonl:13: config has None for 'sites', wanted list"),
        ([row(FIRST, {"groups": 3}, 1.0, batch="1")], None, "13: config has '1' for 'batch', wanted int"),
        ([row(FIRST, {"groups": 3}, None)], None, "13: value is None, wanted milliseconds"),
        ([row(FIRST, {"groups": 3}, -1.0)], None, "13: value is -1.0, wanted milliseconds"),
        ([row(FIRST, {"groups": 5}, 1.0)], None, "13: down_blocks.0.resnets.0 keeps 5 of 'groups', wanted 1..4"),
        ([row(FIRST, {"ff": 3}, 1.0)], None, "13: down_blocks.0.resnets.0 keeps None of 'groups'"),
        ([row("down_blocks.9.resnets.0", {"groups": 3}, 1.0)], None, "13: no site 'down_blocks.9.*did you mean"),
        ([row("mid", {"groups": 3}, 1.0, model="sd21")], None, "13: no site 'mid' in this UNet; rows of sd21$"),
        ([row(FIRST, {"groups": 3}, 1.0, batch=4)], None, "several settings, wanted one: batch 1, .*; batch 4,"),
        ([row(FIRST, {"groups": 3}, 1.0) | {"device": "other"}], None, "several settings"),
        ([], 4, "has no rows of sites at batch 4"),
        ([row("down_blocks.0.attentions.0", {"attn1": 1, "attn2": 2, "ff": 1}, 1.0)], None,
         "rows of site down_blocks.0.attentions.0 narrow one width vector while they widen another"),
    ],
)  # fmt: skip
def test_refuses_latency_rows(extra, batch, message, write):
    with pytest.raises(UserError, match=message):
        read_latencies(write([*micro_rows(), *extra]), MICRO, batch)


def test_refuses_latency_files_and_tables(write, tmp_path):
    rows = list(micro_rows())
    assert read_latencies(write([*rows, *({**x, "config": {**x["config"], "batch": 4}} for x in rows)]), MICRO, 4)
    with pytest.raises(UserError, match=r"nowhere.jsonl is missing"):
        read_latencies(tmp_path / "nowhere.jsonl", MICRO)
    with pytest.raises(UserError, match="has no rows of sites"):
        read_latencies(write([]), MICRO)
    with pytest.raises(UserError, match=r"site down_blocks.0.resnets.0 is not timed with all its units, 4"):
        read_latencies(write(rows[1:]), MICRO)
    table = dict(read_latencies(write(rows), MICRO))
    with pytest.raises(UserError, match=r"budget is 1.5, wanted a share of the dense latency"):
        LatencyBudget(1.5, table)
    with pytest.raises(UserError, match=r"budget 0.1 is too small: .* takes 0.\d{3} of the dense latency"):
        spend(MICRO, LatencyBudget(0.1, table), ones(MICRO))
    for timed, message in (
        (None, "site down_blocks.0.resnets.0 is missing"),
        (SiteLatency(1.0, {"groups": (1.0,) * 4}), "down_blocks.0.resnets.0, 'groups': 4 times, wanted 5"),
        (
            SiteLatency(1.0, {"groups": (0.0, 0.1, -1.1, 0.3, 1.0)}),
            "down_blocks.0.resnets.0 takes a time that is negative",
        ),
        (SiteLatency(math.nan, {"groups": (1.0,) * 5}), "down_blocks.0.resnets.0 takes a time that is negative or not"),
    ):
        broken = {name: found for name, found in {**table, FIRST: timed}.items() if found is not None}
        with pytest.raises(UserError, match=message):
            spend(MICRO, LatencyBudget(0.8, broken), ones(MICRO))
