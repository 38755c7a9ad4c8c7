"""`--world emoji`: a whole run, what it is judged by, and what is refused."""

import json

import pytest

from bilevel_fast import api, evaluate, reproduce, sample, train
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.hub import local
from bilevel_fast.worlds import WORLDS, world
from bilevel_fast.worlds.emoji.settings import Emoji
from commands import run_command

FEW = {"images": 16, "bank": 4, "bank-steps": 2, "judge-erased": 2, "judge-kept": 2, "judge-steps": 2}


def flags(prefix: str = "--emoji.") -> list[str]:
    return [word for name, value in FEW.items() for word in (prefix + name, str(value))]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("emoji") / "run"
    small = ["--lower.steps", "2", "--lower.batch", "2", "--upper.batch", "2", "--upper.every", "1", "--no-twin"]
    done = run_command(train.main, "--world", "emoji", "--out", str(out), *small, *flags())
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_prunes_trains_and_judges_on_it(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["macs"]["ratio"] <= 0.8
    assert list(summary["quality"]["student"]) == [
        "concept_hit", "content_kept", "other_style_hit", "relative_hit", "name", "fid"
    ]  # fmt: skip
    assert load_folder(run / "student").family.world == "emoji"
    config = json.loads((run / "config.json").read_text())
    assert (config["preset"], config["world"], config["erase"]) == ("emoji", "emoji", ["noto"])
    report = (run / "report.html").read_text()
    assert "an owl" in report or "a " in report
    assert "--preset emoji" in report


def test_its_student_is_judged_by_its_probe(run):
    done = run_command(evaluate.main, "--world", "emoji", "--models", str(run / "student"), "--json", *flags())
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout).values()
    assert found == json.loads((run / "summary.json").read_text())["quality"]["student"]


def test_its_teacher_goes_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in WORLDS:
        assert local(name) == world(name).TEACHER
    done = run_command(
        sample.main, "--model", "emoji", "--prompts", "an owl in the style of noto", "--steps", "2", "--out", "a.png"
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "emoji").mkdir()
    assert str(local("emoji")) == "emoji", "what exists is taken as it is"


@pytest.mark.situation
@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (train.main, ["--world", "emoji", "--erase", "nota"], "style 'nota' does not exist; did you mean 'noto'"),
        (train.main, ["--world", "emoji", "--erase", "fluent"], "style 'fluent' cannot be erased"),
        (train.main, ["--world", "emoji", "--teacher", "mini"], "is no model of the emoji world"),
        (evaluate.main, ["--world", "emoji", "--models", "mini"], "is no model of the emoji world; the probe cannot"),
        (evaluate.main, ["--models", "emoji"], "is no model of the mini world; the probe cannot judge it"),
        (sample.main, ["--model", "emoji", "--prompts", "a whale", "--out", "x.png"], "'whale'"),
        (reproduce.main, ["table1", "--world", "emoji", "--run.world", "mini"], "--run.world is not read here"),
        (reproduce.main, ["table1", "--world", "emoji", "--scale", "full", "--run.teacher", "a", "--run.data", "b",
                          "--run.concepts", "c"], "--world emoji is given with --scale full"),
        (reproduce.main, ["table1", "--world", "emojis"], "emojis"),
    ],
)  # fmt: skip
def test_what_the_world_does_not_have(main, words, said, tmp_path, monkeypatch):
    """A style or a word that a world lacks, or a model of another world: refused, the nearest name is said."""
    monkeypatch.chdir(tmp_path)
    out = [] if main in (evaluate.main, sample.main) else ["--out", str(tmp_path / "out")]
    done = run_command(main, *words, *out)
    assert done.returncode == 2
    assert said in done.stderr, done.stderr


def test_the_preset_follows_the_world():
    config = train.parse(["--world", "emoji"])
    assert (config.preset, config.erase, config.built_in) == ("emoji", ("noto",), "emoji")
    assert train.parse(["--preset", "smoke", "--world", "emoji", "--erase", "noto"]).lower.steps == 8
    assert train.parse([]).preset == "mini"
    args = reproduce.parse(["fig6", "--world", "emoji"])
    assert (args.run.preset, args.run.erase) == ("emoji", ("noto", "contrast", "twemoji"))
    with pytest.raises(UserError, match="fig6 erases 3 concepts"):
        reproduce.parse(["fig6", "--world", "emoji", "--run.erase", "noto"])


def test_in_python_the_world_decides_what_is_erased():
    few = Emoji(judge_erased=1, judge_kept=1, judge_steps=2)
    (found,) = api.evaluate(["emoji"], emoji=few).values()
    assert found == next(iter(api.evaluate(["emoji"], ["noto"], emoji=few).values()))
    assert "relative_hit" in found
