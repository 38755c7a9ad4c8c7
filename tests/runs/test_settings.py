"""Settings that would spoil a run are refused before it begins, whatever the command."""

import dataclasses
import math
import sys

import pytest
import torch

from bilevel_fast import evaluate, reproduce, sample
from bilevel_fast.base.errors import UserError, check_finite
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.runs.paper import run as paper
from bilevel_fast.runs.session import check_world
from bilevel_fast.train import parse
from bilevel_fast.training.loop import running
from bilevel_fast.worlds import pretrain, probe
from bilevel_fast.worlds.emoji import pretrain as emoji_pretrain
from bilevel_fast.worlds.emoji import probe as emoji_probe
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini import pretrain as mini_pretrain
from bilevel_fast.worlds.mini import probe as mini_probe
from commands import run_command

NUMBERS = [
    *("--lower.lr", "--clip-norm", "--upper.eta", "--upper.lr", "--lower.weights.output", "--lower.snr-gamma"),
    *("--mini.guidance", "--upper.esd.guidance", "--upper.penalty", "--upper.controller.gone", "--prune.budget"),
]


@pytest.mark.situation
@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_no_setting_is_infinite_or_not_a_number(value):
    """A learning rate, a norm or a weight is inf or nan: refused before anything starts, by flag and value."""
    for flag in NUMBERS:
        with pytest.raises(UserError) as refusal:
            parse([flag, value])
        assert value in str(refusal.value)
        assert len(str(refusal.value).splitlines()) == 1


def test_every_float_of_a_run_is_looked_at():
    """By the types of the fields: one that is added later is looked at as well."""

    def spoilt(config):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                yield from (dataclasses.replace(config, **{field.name: inner}) for inner in spoilt(value))
            elif "float" in str(field.type):
                bad = (math.nan,) if "tuple" in str(field.type) else math.nan
                try:
                    yield dataclasses.replace(config, **{field.name: bad})
                except UserError:
                    continue

    several = list(spoilt(TrainConfig()))
    assert len(several) > 20
    for config in several:
        with pytest.raises(UserError, match="nan: wanted finite"):
            config.check()
    check_finite(TrainConfig())


@pytest.mark.situation
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mini.judge-steps", "100000"], "--mini.judge-steps: steps is 100000; a schedule of 1000 timesteps"),
        (["--mini.bank-steps", "1"], "--mini.bank-steps: steps is 1; pndm"),
        (["--mini.judge-steps", "1000"], "--mini.judge-steps: steps is 1000; its grid would start at timestep 1000"),
        (["--upper.eraser", "esd", "--upper.esd.steps", "2000"], "--upper.esd.steps: steps is 2000"),
        (["--upper.eraser", "concept-prune", "--upper.concept-prune.steps", "2000"], "--upper.concept-prune.steps: st"),
    ],
)
def test_steps_of_sampling_that_a_schedule_does_not_have(flags, message, mini_teacher):
    """The judge, or an eraser, is to sample in more steps than there are timesteps: refused before the training."""
    with pytest.raises(UserError) as refusal:
        check_world(parse(flags), mini_teacher)
    assert str(refusal.value).startswith(message)


@pytest.fixture(scope="module")
def mini_teacher():
    class Folder:
        schedule = Schedule.load(TEACHER)
        family = type("Family", (), {"world": "mini"})

    return Folder


@pytest.mark.situation
@pytest.mark.parametrize(
    "flags", [["--mini.judge-kept", "0"], ["--mini.judge-erased", str(10**9)], ["--mini.images", "0"], ["--seed", "-1"]]
)
def test_counts_that_no_judge_can_work_with(flags):
    """The judge is given nothing to look at, or more than any memory holds: refused before the training."""
    with pytest.raises(UserError, match=f"{flags[0]} is {flags[1]}: wanted"):
        parse(flags)


@pytest.mark.situation
def test_other_commands_refuse_them_too(tmp_path):
    """`evaluate`, `reproduce` and `sample` with a guidance, a size or steps that cannot be: one line, and no work."""
    cases = [
        (evaluate.main, ["--mini.guidance", "nan"], "--mini.guidance is nan: wanted finite"),
        (reproduce.main, ["table1", "--run.lower.lr", "inf"], "--run.lower.lr is inf: wanted finite"),
        (reproduce.main, ["table1", "--rows.attack.lr", "nan"], "nan"),
        (sample.main, ["--prompts", "a red star", "--size", "1000000"], "latent size is 1000000; it must be"),
        (sample.main, ["--prompts", "a red star", "--size", "0"], "latent size is 0; it must be"),
        (sample.main, ["--prompts", "a red star", "--guidance", "inf"], "--guidance is inf: wanted finite"),
    ]
    for main, flags, message in cases:
        out = ["--out", str(tmp_path / "out")] if main is not evaluate.main else []
        result = run_command(main, *flags, *out)
        assert result.returncode == 2, flags
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.situation
def test_reproduce_looks_at_the_steps_of_its_judges_first(tmp_path):
    """An experiment's judge is to sample in more steps than there are: refused, and no folder is begun."""
    args = reproduce.parse(["table1", "--run.mini.judge-steps", "5000"])
    with pytest.raises(UserError, match=r"--mini\.judge-steps: steps is 5000"):
        paper.reproduce("table1", args.run, args.rows, None, (0,), tmp_path / "out")
    assert not list(tmp_path.iterdir())


TRAIN = [mini_probe, mini_pretrain, emoji_probe, emoji_pretrain]
"""Commands that make shipped weights."""


@pytest.mark.situation
@pytest.mark.parametrize("module", TRAIN)
def test_help_does_not_train(module, monkeypatch, capsys):
    """`--help` of the commands that make the shipped weights: says what they do, trains and writes nothing."""
    for taught in (probe, pretrain):
        monkeypatch.setattr(taught, "train", lambda *_, **__: pytest.fail("it trains"))
    monkeypatch.setattr(sys, "argv", [module.__name__, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    assert "--out" in capsys.readouterr().out


@pytest.mark.situation
@pytest.mark.parametrize("module", TRAIN)
def test_the_shipped_weights_are_not_the_default(module, monkeypatch, tmp_path):
    """A probe or a teacher is trained without saying where to: refused; and what is there is not written over."""
    for taught in (probe, pretrain):
        monkeypatch.setattr(taught, "train", lambda *_, **__: pytest.fail("it trains"))
    there = tmp_path / "there.safetensors"
    there.touch()
    for flags in ([], ["--out", str(there)]):
        result = run_command(module.main, "--steps", "1", *flags)
        assert result.returncode == 2
        assert "--out" in result.stderr


@pytest.mark.situation
def test_anomaly_mode_is_off_while_a_run_trains(caplog):
    """Somebody's script has switched on autograd's anomaly mode: it is off while the run trains, and said so."""
    with torch.autograd.set_detect_anomaly(True):
        with running((), torch.device("cpu")):
            assert not torch.is_anomaly_enabled()
        assert torch.is_anomaly_enabled()
    assert "anomaly mode is switched off" in caplog.text
    with running((), torch.device("cpu")):
        assert not torch.is_anomaly_enabled()
    assert caplog.text.count("anomaly") == 1
