"""The command, end to end: on the mini world with a handful of steps, and in full on a small Stable Diffusion."""

import json
import re
import signal
import time

import pytest
import torch
from PIL import Image

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import load_unet
from bilevel_fast.reproduce import main, parse
from commands import run_command
from forked import Started

SMALL = ["--run.preset=smoke", "--run.lower.steps=4", "--run.upper.every=2", "--seeds=0"]
ROWS = ["--rows.esd.sample.steps=4", "--rows.concept-prune.steps=2", "--rows.attack.steps=2", "--rows.attack.batch=2"]
MODELS = ["teacher", "distilled", "esd", "uce", "concept-prune", "bilevel", "bilevel-uce", "sld"]


def reproduce(*flags):
    return run_command(main, *flags)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def table1(tmp_path_factory):
    out = tmp_path_factory.mktemp("reproduce") / "mini"
    result = reproduce("table1", *SMALL, *ROWS, "--out", out)
    assert result.returncode == 0, result.stderr
    return out, result


def test_everything_is_left_behind(table1):
    out, result = table1
    rows = rows_of(out / "table1")
    assert [row["row"] for row in rows] == MODELS
    numbers = {row["row"]: row["numbers"] for row in rows}
    assert (numbers["distilled"]["cp"], numbers["distilled"]["style"]) == (0, pytest.approx(100))
    assert len({json.dumps(some) for some in numbers.values()}) >= 5, "these are different models"
    assert numbers["sld"] != numbers["distilled"], "the same weights, sampled otherwise"
    assert not (out / "seed-0" / "pointillism" / "sld").exists()
    for name in MODELS[1:-1]:
        assert (out / "seed-0" / "pointillism" / name / "unet" / "structure.json").is_file(), name
    told = (out / "table1" / "table.md").read_text()
    assert "distilled + ESD" in told
    assert "Measured on" in told
    assert told.splitlines()[2] in result.stdout
    results = json.loads((out / "table1" / "results.json").read_text())
    assert results["rows"] == rows
    assert {column["key"] for column in results["columns"]} == set(numbers["esd"])
    assert Image.open(out / "table1" / "grid.png").width > 1000
    assert Image.open(out / "table1" / "plot.png").width > 1000
    assert "bilevel_fast.reproduce table1 --run.preset smoke" in (out / "table1" / "report.html").read_text()


def test_rows_are_made_as_they_say(table1):
    place = table1[0] / "seed-0" / "pointillism"
    records = {name: (place / f"stats-{name}.jsonl").read_text() for name in ("distilled", "bilevel", "bilevel-uce")}
    assert "upper/" not in records["distilled"]
    assert "upper/suppression" in records["bilevel"]
    assert "upper/" in records["bilevel-uce"]
    assert "upper/suppression" not in records["bilevel-uce"]
    weights = {name: load_unet(place / name).state_dict() for name in MODELS[1:-1]}

    def moved(name):
        return {key for key, value in weights[name].items() if not torch.equal(value, weights["distilled"][key])}

    assert moved("esd")
    assert all(".attn2." in key for key in moved("esd"))
    assert moved("uce") == {key for key in weights["uce"] if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert moved("concept-prune")
    assert all(key.endswith("ff.net.2.weight") for key in moved("concept-prune"))
    assert len(moved("bilevel")) > 100, "all of it was trained"


def test_another_experiment_uses_the_same_models(table1):
    out, _ = table1
    before = (out / "seed-0" / "pointillism" / "bilevel" / "unet").stat().st_mtime_ns
    result = reproduce("table3", *SMALL, *ROWS, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "making" not in result.stderr
    assert (out / "seed-0" / "pointillism" / "bilevel" / "unet").stat().st_mtime_ns == before
    first, third = ({row["row"]: row["numbers"]["fid"] for row in rows_of(out / name)} for name in ("table1", "table3"))
    assert first == third


def test_rows_that_are_there_are_kept_and_a_torn_one_is_measured_again(table1):
    out, _ = table1
    whole = (out / "table1" / "rows.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (out / "table1" / "rows.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:40])
    result = reproduce("table1", *SMALL, *ROWS, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "its last line was cut short" in result.stderr
    assert (out / "table1" / "rows.jsonl").read_bytes() == whole


def test_rows_of_other_concepts_are_not_taken_for_these(table1):
    out, _ = table1
    before = rows_of(out / "table1")
    assert {tuple(row["concepts"]) for row in before} == {("pointillism",)}
    result = reproduce("fig7", *SMALL, *ROWS, "--out", out)
    assert result.returncode == 0, result.stderr
    others = [{**row, "concepts": ["waves"], "numbers": {"plain": 999.0}} for row in rows_of(out / "fig7")]
    (out / "fig7" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    result = reproduce("fig7", *SMALL, *ROWS, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "999" not in result.stdout
    assert rows_of(out / "fig7")[: len(others)] == others, "and they are kept"


def test_other_settings_are_refused(table1):
    out, _ = table1
    result = reproduce("table1", *SMALL, *ROWS, "--run.lower.lr", "1e-3", "--out", out)
    assert result.returncode == 2
    assert result.stderr.strip().endswith("run.lower.lr was 0.0003, is 0.001")


def test_attacks(table1):
    out, _ = table1
    result = reproduce("table2", *SMALL, *ROWS, "--out", out)
    assert result.returncode == 0, result.stderr
    numbers = {row["row"]: row["numbers"] for row in rows_of(out / "table2")}
    assert numbers["teacher"]["named"] == numbers["teacher"]["vector"] == 0, "it has forgotten nothing"
    assert numbers["uce"]["named"] == 100
    assert numbers["teacher"]["named_content"] > 50, "and draws what was asked for besides"
    assert all(0 <= value <= 100 for some in numbers.values() for value in some.values())


def test_a_curve_is_one_training(tmp_path):
    """Stopped by SIGTERM on the way and gone on with, a curve is measured at its steps, each once."""
    flags = ["fig5", *SMALL, "--run.lower.steps", "8", "--out", tmp_path / "run"]
    process = Started("reproduce", *flags, log=tmp_path / "log")
    while not (tmp_path / "run" / "fig5" / "rows.jsonl").exists() and process.runs():
        time.sleep(0.05)
    process.send(signal.SIGTERM)
    if process.wait() == 130:  # it stops between training steps, not while it measures
        assert "the same command goes on" in process.said()
    result = reproduce(*flags)
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "run" / "fig5")
    assert [(row["row"], row["step"]) for row in rows] == [
        (name, step) for name in ("random", "pruned") for step in (0, 1, 2, 4, 6, 8)
    ]
    fid = {(row["row"], row["step"]): row["numbers"]["fid"] for row in rows}
    assert fid["random", 0] > 2 * fid["pruned", 0]
    for name in ("random", "pruned"):
        assert fid[name, 0] == fid[name, 1], "the first step has learning rate 0"
        assert len({fid[name, step] for step in (1, 2, 4, 6, 8)}) == 5


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("table1", "--run.lowr.lr", "1"), "there is no flag '--run.lowr.lr'; did you mean '--run.lower.lr'"),
        (("fig6", "--run.erase", "waves"), "fig6 erases 3 concepts; --run.erase names 1"),
        (("table1", "--run.upper.every", "0"), "there would be nothing to compare"),
        (("table1", "--rows.attack.steps", "0"), "--attack.steps is 0; wanted a positive number"),
        (("table1", "--run.seed", "3"), "--run.seed is not read here; --seeds has them all"),
        (("table1", "--run.out", "x"), "--run.out is not read here; --out is the folder of all experiments"),
        (("table1", "--full.phrase", "naked"), "--full.* is given without --scale full"),
        (("table1", "--scale", "full"), "--scale full wants --run.teacher, --run.data and --run.concepts"),
    ],
)
def test_bad_input_is_one_line(flags, says):
    with pytest.raises(UserError, match=re.escape(says)):
        parse(flags)


def test_bad_input_at_the_terminal(tmp_path):
    result = reproduce("table1", "--run.erase", "pointilism", "--out", tmp_path / "out")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.strip() == "error: style 'pointilism' does not exist; did you mean 'pointillism'?"
    assert "Missing from python -m bilevel_fast.reproduce" in reproduce().stderr


def test_presets_follow_the_scale():
    small, full = parse(["table1"]), ["--scale", "full", "--run.teacher", "t", "--run.data", "d", "--run.concepts", "c"]
    large = parse(["table2", *full, "--full.phrase", "naked"])
    assert (small.run.preset, small.rows.esd.sample.steps) == ("mini", 20)
    assert (large.run.preset, large.rows.esd.sample.steps, large.run.lower.steps) == ("paper", 50, 20_000)
    assert parse(["fig6"]).run.erase == ("pointillism", "waves", "mosaic")
    assert parse(["table1", "--run.preset=smoke"]).run.lower.steps == 8
