"""Tables and plots of rows that are made up."""

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from bilevel_fast.base.errors import UserError
from bilevel_fast.reproduce import parse
from bilevel_fast.runs.config import preset
from bilevel_fast.runs.page import experiment as page
from bilevel_fast.runs.paper.again import reproduction
from bilevel_fast.runs.paper.benches import Bench, alone, styles_of
from bilevel_fast.runs.paper.experiments import ERASE, EXPERIMENTS, Experiment, TableRow
from bilevel_fast.runs.paper.judges import Column
from bilevel_fast.runs.paper.report import plot, table
from bilevel_fast.runs.paper.run import _run
from bilevel_fast.runs.paper.settings import Full
from bilevel_fast.training.run_folder import RunFolder

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


def test_concepts_erased_apart_are_averaged_within_a_seed():
    """The range is over seeds; a seed that lacks a concept's number has none."""
    rows = [row("a", s, 8, h, f) for s, h, f in ((0, 1.0, 10.0), (0, 0.5, 14.0), (1, 0.25, 8.0), (1, 0.25, None))]
    _, _, a, _ = cells(table(MODELS, COLUMNS, rows))
    assert a == ["model a", "0.50 ± 0.25", "12.0 (1 of 2 seeds)"]


def test_models_of_a_table_that_erases_apart():
    apart = replace(MODELS, apart=True)
    named = [(r.name, erase) for r, erase in apart.models(["x", "y"])]
    assert named == [("a", ("x",)), ("b", ("x",)), ("a", ("y",)), ("b", ("y",))]
    assert [erase for _, erase in MODELS.models(["x", "y"])] == [("x", "y")] * 2
    assert EXPERIMENTS["table1"].apart
    last = [r.name for r, erase in EXPERIMENTS["fig6"].models(["x", "y", "z"]) if len(erase) == 3]
    assert last == [f"{name}-3" for name in ("distilled", "esd", "uce", "concept-prune", "bilevel")]


class Made:
    """Models and numbers that are made up, of one seed and some concepts."""

    device = torch.device("cpu")

    def __init__(self, seed, concepts):
        self.number, self.said = seed + len(concepts[0]), concepts

    def columns(self, measure):
        return COLUMNS

    def __call__(self, *asked):
        return Path(asked[0]) if len(asked) == 1 else {"hit": float(self.number), "fid": None}

    def pictures(self, name, path):
        return torch.zeros(1, 3, 8, 8), [f"without {' and '.join(self.said)}"]


def test_each_concept_has_rows_of_its_own_and_none_is_measured_twice(tmp_path):
    made = []

    def benches(seed, concepts):
        made.append((seed, concepts))
        return Bench(Made(seed, concepts), Made(seed, concepts))

    def run(*concepts):
        apart = replace(MODELS, apart=True)
        return _run(apart, preset("smoke"), concepts, (0, 2), benches, RunFolder(tmp_path), lambda seeds: "again")

    text = run("x", "four")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").open()]
    assert [(r["seed"], r["concepts"], r["row"]) for r in rows] == [
        (seed, [name], row) for seed in (0, 2) for name in ("x", "four") for row in "ab"
    ]
    assert made == [(seed, (name,)) for seed in (0, 2) for name in ("x", "four")]
    assert cells(text)[2] == ["model a", "3.50 ± 1.00", "not measured"]
    assert "without four" in (tmp_path / "report.html").read_text()
    assert run("x", "four") == text
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(rows)
    assert cells(run("x"))[2] == ["model a", "2.00 ± 1.00", "not measured"], "those of the other are not read"


def test_a_model_of_one_concept_has_its_bank_weight_and_prompts():
    full = Full(phrase=("by a", "by b"), styles=(Path("a.csv"), Path("b.csv")))
    config = replace(preset("paper"), concepts=(Path("bank-a"), Path("bank-b")), concept_weights=(1.0, 3.0))
    found = alone(config, full, ["by b"])
    assert (found.concepts, found.concept_weights) == ((Path("bank-b"),), (3.0,))
    assert alone(replace(config, concept_weights=()), full, ["by b"]).concept_weights == ()
    assert styles_of(full, ["by b"]) == (Path("b.csv"),)
    assert styles_of(full, ["by a", "by b"]) == full.styles
    one = replace(full, styles=(Path("all.csv"),))
    assert styles_of(one, ["by b"]) == one.styles


@pytest.mark.situation
def test_prompts_for_some_of_the_concepts_are_refused():
    """`reproduce table1` makes models for each concept, and has prompt files for some of them: refused."""
    words = [
        "--run.teacher",
        "sd21",
        "--run.data",
        "cache",
        "--run.concepts",
        "a",
        "b",
        "--full.phrase",
        "by a",
        "by b",
    ]
    told = "table1 makes models for each of 2 --full.phrase; --full.styles names 1 prompt files, wanted one each"
    with pytest.raises(UserError, match=told):
        parse(["table1", "--scale", "full", *words, "--full.styles", "a.csv"])
    assert len(parse(["table1", "--scale", "full", *words]).full.phrase) == 2


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
