"""`prune --latency`: the budget is a share of the time that a file says, whatever the method."""

import json
import re

import pytest

from bilevel_fast.base import errors
from bilevel_fast.models.architecture import sites
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.macs import count, site_costs
from bilevel_fast.models.structure import Structure
from bilevel_fast.pruning import FIXED, METHODS, LatencyBudget, MacBudget, read_latencies
from bilevel_fast.pruning.budget import choices
from bilevel_fast.pruning.latency import SiteLatency
from mini_folder import TINY
from planning import MICRO, timed_row

FEW = ("--images", 4, "--batch", 2)
BY_MACS_ONLY = ("gates",)


def ms(site, share):
    """Time that does not go with MACs: Transformers take what ResNets do, and half of a site's units a third of it."""
    return (1.0 + 0.01 * len(site.name)) * (1.0 if share == 1 else 1 / 3)


@pytest.fixture
def write(tmp_path):
    def command(*batches):
        rows = [
            timed_row(
                site.name, {w.name: int(w.units * share) for w in site.widths}, n * ms(site, share), batch=n, text=12
            )
            for n in batches
            for site in sites(TINY)
            for share in (1.0, 0.5)
        ]
        path = tmp_path / "sites.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return path

    return command


def taken(structure, path, batch=None):
    """Share of the time of all sites, site by site from what the rows mean."""
    table = read_latencies(path, structure.config, batch)
    dense = sum(table[s.name].ms({w.name: w.units for w in s.widths}) for s in sites(structure.config))
    left = sum(table[name].ms({w: len(units) for w, units in kept.items()}) for name, kept in structure.kept.items())
    return left / dense, left, dense


@pytest.mark.parametrize("method", [name for name in METHODS if name not in (*BY_MACS_ONLY, "bk-sdm-base")])
def test_the_plan_costs_what_it_says(method, teacher, write, run, tmp_path):
    out, path = tmp_path / "student", write(1)
    goal = () if method in FIXED else ("--budget", 0.7)
    code, stdout, stderr = run(method, "--teacher", teacher, "--latency", path, *goal, "--out", out, *FEW)
    assert (code, stderr) == (0, "")
    structure = load_folder(out).structure
    assert structure is not None
    share, left, dense = taken(structure, path)
    limit = "budget 0.7" if goal else f"fixed by {method}"
    assert not goal or (0.6 if structure.dropped else 0.69) < share <= 0.7
    assert f"time        {dense:.4g} ms -> {left:.4g} ms: {share:.4f}, {limit}\n" in stdout
    assert f"of the sites alone, by {path}: batch 1, latent 8, text 12, align 1, d\n" in stdout
    macs = count(structure, TINY.sample_size, 12)
    assert f"G: {macs.ratio:.4f}\n" in stdout
    assert abs(macs.ratio - share) > 0.002, "not the plan of a budget of MACs"
    lines = stdout.splitlines()
    assert lines[0].split()[:3] == ["site", "latency", "kept"]
    assert sum(float(line.split()[3].rstrip("%")) for line in lines[1 : 1 + len(sites(TINY))]) == pytest.approx(
        100 * (1 - share), abs=0.005 * len(sites(TINY))
    )


def test_methods_that_spend_macs_alone_say_so(teacher, write, run, tmp_path):
    for method in BY_MACS_ONLY:
        if method in METHODS:
            code, _, stderr = run(method, "--teacher", teacher, "--latency", write(1), "--out", tmp_path / "x", *FEW)
            assert (code, stderr.count("\n")) == (2, 1)
            assert "MACs; for a budget of time take" in stderr


def test_batch_is_chosen(teacher, write, run, tmp_path):
    path, base = write(1, 4), ("uniform", "--teacher", teacher, "--out", tmp_path / "student")
    code, stdout, stderr = run(*base, "--latency", path)
    assert (code, stdout) == (2, "")
    assert "rows of several settings, wanted one: batch 1, latent 8, text 12, align 1, d; batch 4," in stderr
    assert "--latency-batch" in stderr
    code, stdout, _ = run(*base, "--latency", path, "--latency-batch", 4)
    assert code == 0
    structure = load_folder(tmp_path / "student").structure
    assert structure is not None
    assert f"{taken(structure, path, 4)[2]:.4g} ms -> " in stdout


def test_measured_and_projected_rows_do_not_mix(write):
    path = write(1)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "projection": True}) + "\n" for row in rows))
    assert read_latencies(path, TINY).settings.endswith("d, projection")
    path.write_text("".join(json.dumps({**row, "projection": i % 2 == 0}) + "\n" for i, row in enumerate(rows)))
    with pytest.raises(errors.UserError, match="several settings"):
        read_latencies(path, TINY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", 0), "budget is 0.0, wanted a share of the dense latency, 0 < budget <= 1"),
        (("--budget", "nan"), "--budget is nan: wanted finite"),
        (("--budget", 2), "budget is 2.0, wanted a share of the dense latency"),
        (("--budget", 0.2), r"budget 0.2 is too small: keeping 25% of .* takes 0\.\d{3} of the dense latency"),
        (("--latency", "nowhere.jsonl"), "nowhere.jsonl is missing"),
        (("--latency-batch", 3), "sites.jsonl has no rows of sites at batch 3"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["magnitude", "diff-pruning"])
def test_refusals(method, arguments, message, teacher, write, run, tmp_path):
    out = tmp_path / "student"
    code, stdout, stderr = run(method, "--teacher", teacher, "--latency", write(1), *arguments, "--out", out, *FEW)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert re.search(message, stderr), stderr
    assert not out.exists()


def test_a_batch_of_no_file(teacher, run, tmp_path):
    code, _, stderr = run("uniform", "--teacher", teacher, "--latency-batch", 3, "--out", tmp_path / "student")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "--latency-batch" in stderr


def test_prices_of_a_structure():
    """Whole MACs as they are counted; by time the sum of the standing sites."""
    structure = Structure.uniform(TINY, 0.5, ["mid_block.attentions.0"])
    prices = MacBudget(0.5, 8, 12).prices(TINY)
    assert prices.of(structure) == count(structure, 8, 12).true
    assert prices.of(Structure.dense(TINY)) == prices.dense == count(Structure.dense(TINY), 8, 12).true
    costs = site_costs(TINY, 8, 12)["up_blocks.0.resnets.0"]
    assert prices.site(structure, "up_blocks.0.resnets.0") == costs.total({"groups": 4}).true
    assert prices.site(structure, "mid_block.attentions.0") == 0


def test_uniform_buys_what_fits_after_a_unit_that_costs_less_than_nothing():
    """Three groups are quicker than two in every ResNet; what that frees is spent before `uniform` ends."""
    slow = SiteLatency(1.0, {"groups": (0.0, 1.0, 3.0, 2.0, 4.0)})
    flat = {w: (1.0,) * (n + 1) for w, n in (("attn1", 2), ("attn2", 2), ("ff", 4))}
    table = {s.name: slow if s.kind == "resnet" else SiteLatency(0.5, flat) for s in sites(MICRO)}
    dense = 3 * 5.0 + 3 * 3.5
    for ms_left in (16.5, 17.0, 18.5, 19.5, 20.5, 21.5, 23.5):
        budget = LatencyBudget(ms_left / dense + 1e-9, table)
        found, spare = choices(MICRO, budget)
        structure = METHODS["uniform"](teacher_of(MICRO), budget, ())
        counts = [structure.count(c.site, c.width) for c in found]
        left = spare - sum(int(c.prices[k] - c.prices[c.least]) for c, k in zip(found, counts, strict=True))
        nexts = [int(c.prices[k + 1] - c.prices[k]) for c, k in zip(found, counts, strict=True) if k < c.width.units]
        assert left >= 0
        assert not nexts or left < min(nexts)


def teacher_of(config):
    from bilevel_fast.models.unet import UNet

    return UNet(config)
