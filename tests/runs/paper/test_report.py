"""Tables and plots of rows that are made up."""

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from bilevel_fast.reproduce import parse
from bilevel_fast.runs.page import experiment as page
from bilevel_fast.runs.paper.again import reproduction
from bilevel_fast.runs.paper.experiments import ERASE, EXPERIMENTS, Experiment, TableRow
from bilevel_fast.runs.paper.judges import Column
from bilevel_fast.runs.paper.report import plot, table

COLUMNS = (Column("hit", "hit", "down"), Column("fid", "FID", "", 1))
MODELS = Experiment("made up", "style", (TableRow("a", "model a", "distilled"), TableRow("b", "model b", "bilevel")))
AGAINST = Experiment("made up", "style", MODELS.rows, against="a")
CURVE = Experiment("made up", "kept", (TableRow("a", "model a", "distilled", steps=(0.0, 0.5)),))


def row(name, seed, step, hit, fid):
    return {"row": name, "seed": seed, "step": step, "numbers": {"hit": hit, "fid": fid}}


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_mean_and_half_the_range():
    rows = [row("a", s, 8, h, f) for s, h, f in ((0, 1.0, 10.0), (1, 0.5, 14.0))] + [row("b", 0, 8, 0.25, None)]
    head, _, a, b = cells(table(MODELS, COLUMNS, rows))
    assert head == ["seeds 0, 1", "hit (down)", "FID"]
    assert a == ["model a", "0.75 ± 0.25", "12.0 ± 2.0"]
    assert b == ["model b", "0.25 (1 of 2 seeds)", "not measured"]


def test_change_against_a_row():
    rows = [row("a", 0, 8, 4.0, 0.0), row("b", 0, 8, 1.0, 3.0)]
    _, _, a, b = cells(table(AGAINST, COLUMNS, rows))
    assert a == ["model a", "4.00", "0.0"]
    assert b == ["model b", "1.00 (-75 %)", "3.0"], "there is no percent of nothing"


def test_a_curve_is_told_by_its_last_step():
    _, _, a = cells(
        table(CURVE, COLUMNS, [row("a", 0, 4, 0.5, 7.0), row("a", 0, 8, 0.125, 3.0), row("a", 0, 0, 1.0, 9.0)])
    )
    assert a == ["model a", "0.12", "3.0"]


def test_plots_are_drawn(tmp_path):
    rows = [row(name, seed, step, 0.5, 4.0 + step) for name in "ab" for seed in (0, 1) for step in (0, 4, 8)]
    for experiment in (MODELS, CURVE):
        plot(experiment, COLUMNS, rows, tmp_path / "plot.png")
        colors = Image.open(tmp_path / "plot.png").convert("RGB").getcolors(1 << 20)
        assert len(colors) > 20, "more than paper and ink"
        (tmp_path / "plot.png").unlink()
    plot(MODELS, COLUMNS, [row("a", 0, 8, None, None)], tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists(), "nothing measured, nothing drawn"


def test_a_page_has_means_and_their_spread_over_seeds():
    about = {"device": "<cpu>", "threads": 2, "torch": "2.11", "concepts": ["waves"]}
    rows = [row("a", s, 8, h, 3.0) | about for s, h in ((0, 1.0), (1, 0.5))] + [row("b", 0, 8, 0.25, None) | about]
    text = page.report(MODELS, COLUMNS, rows, b"png", ["a star"], "python -m x")
    for said in (
        "0.75<small>± 0.25</small>",
        "0.25<small>1 of 2 seeds</small>",
        "<td>not measured</td>",
        "hit<small>↓</small>",
        "&lt;cpu&gt;, 2 threads, torch 2.11",
        "2 models, seeds 0, 1; erased: waves.",
        'alt="Samples: a line for each of model a, model b; a column for each prompt: a star"',
        "<code>python -m x</code>",
    ):
        assert said in text, said
    assert "On the way" not in text
    curve = page.report(CURVE, COLUMNS, [row("a", 0, step, 0.5, 4.0 + step) | about for step in (0, 4)], None, [], "x")
    assert 'aria-label="FID, mean over seeds, over lower steps: model a from 4 to 8"' in curve


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_command_repeats_the_experiment(name):
    asked = ["--run.preset", "smoke", "--run.erase", "waves", "mosaic", "line art", "--rows.uce.ridge", "0.25"]
    for flags in ([], ["--world", "emoji"], [*asked, "--run.no-graphs", "--rows.esd.lr", "1e-3"]):
        wanted = parse([name, *flags, "--seeds", "1", "2", "--out", "a b/c"])
        held = json.loads(json.dumps({"run": wanted.run.to_dict(), "rows": asdict(wanted.rows)}, default=str))
        words = shlex.split(reproduction(name, held, wanted.seeds, Path("a b/c")))
        assert parse(words[3:]) == replace(wanted, out=Path("a b/c-again"))


def test_every_experiment_is_named_by_what_it_needs():
    for name, experiment in EXPERIMENTS.items():
        rows = experiment.rows
        assert len({r.name for r in rows}) == len(rows), name
        assert all(experiment.concepts <= len(styles) for styles in ERASE.values()), name
        assert experiment.against in ("", *(r.name for r in rows)), name
        assert all(0 <= share < 1 for r in rows for share in r.steps), name
