"""The whole rehearsal on a tiny folder: every command line, every check; and what limits, kills and failures do."""

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("nvidia.dali")

from benchmarks.real_size import __main__ as command_line
from benchmarks.real_size import measuring, table
from benchmarks.real_size.folder import REAL, networks
from benchmarks.real_size.measuring import Taken
from benchmarks.real_size.run import Done, rehearse
from benchmarks.real_size.stages import TINY, Stage, stages
from bilevel_fast.base.errors import UserError
from commands import run_command

GIB = 2**30


def in_this_process(arguments, cwd, log, longest, kill=None, env=None) -> Taken:
    """Stands for `measuring.run`: an entry point's `main`, without the seconds that a process takes to start."""
    name, *flags = arguments
    if kill is not None:
        return measuring.run(arguments, cwd, log, longest, kill, env)
    done = run_command(importlib.import_module(name).main, *flags, cwd=cwd)
    with log.open("a") as file:
        file.write(done.stdout + done.stderr)
    return Taken(done.returncode, 0.5, GIB, GIB // 2)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[Path, dict[str, Done]]:
    out = tmp_path_factory.mktemp("rehearsal") / "out"
    found = rehearse(stages(TINY), TINY, out, runner=in_this_process, say=lambda done: None)
    return out, {done.name: done for done in found}


@pytest.mark.slow
@pytest.mark.parametrize("stage", stages(TINY), ids=lambda stage: stage.name)
def test_every_command_does_what_it_should(rehearsed, stage):
    out, found = rehearsed
    assert not found[stage.name].why
    row = found[stage.name].row
    assert row is not None
    assert row["found"]
    assert row["command"].startswith(f"python -m {stage.command[0]} ")
    assert str(out) not in json.dumps(row), "a row names no folder of this machine"
    assert not any((out / name).exists() for name in stage.drop)


@pytest.mark.slow
def test_the_training_was_killed_and_went_on(rehearsed):
    _, found = rehearsed
    row = found["train"].row
    assert row is not None
    assert row["command"].endswith(" --resume")
    assert row["found"]["lower_steps"] == 4
    first, second = row["sessions_gib"]
    assert 0.1 < first["held"] < first["peak"], "a process was measured"
    assert row["held_gib"] == max(first["held"], second["held"])


@pytest.mark.slow
def test_what_is_finished_is_kept(rehearsed):
    out, _ = rehearsed
    found = rehearse(stages(TINY), TINY, out, runner=None, say=lambda done: None)  # nothing runs
    assert all(done.kept and not done.why for done in found)


@pytest.mark.slow
def test_a_damaged_student_is_seen(rehearsed):
    out, _ = rehearsed
    train = next(stage for stage in stages(TINY) if stage.name == "train")
    stats = out / "run" / "stats.jsonl"
    before = stats.read_text()
    stats.write_text("".join(before.splitlines(keepends=True)[:3]))
    with pytest.raises(UserError, match="the number of images, step by step is"):
        train.check(out, {})
    stats.write_text(before)


# --- stages that cost nothing ---


def stage(name, *, seconds=60.0, gib=4.0, **settings):
    """Writes the file of its name."""
    code = f"open({name + '.txt'!r}, 'x').write('x')"
    return Stage(name, ("timeit", "-n1", "-r1", code), (f"{name}.txt",), check, seconds, gib, **settings)


def check(out, rows):
    return {"rows": len(rows)}


def test_a_stage_over_its_limit_fails_the_run(tmp_path, monkeypatch, capsys):
    slow, large = stage("slow", seconds=0.001), stage("large", gib=0.001)
    monkeypatch.setattr(command_line, "stages", lambda scale: (slow, stage("good"), large))
    done = run_command(command_line.main, "--tiny", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "2 of 3 stages failed: slow, large" in done.stderr
    assert "the limit is 0.001" in done.stdout
    # and again: it is kept, and it is still over its limit
    assert run_command(command_line.main, "--tiny", "--out", tmp_path / "out").returncode == 1
    monkeypatch.setattr(command_line, "stages", lambda scale: (stage("good"),))
    assert run_command(command_line.main, "--tiny", "--out", tmp_path / "out").returncode == 0


def test_a_killed_rehearsal_goes_on_where_it_was(tmp_path):
    three = [stage("a"), stage("b", needs=("a",)), stage("c", needs=("b",))]

    def killed(arguments, **settings):
        if "b.txt" in arguments[-1]:
            (tmp_path / "b.txt").write_text("half")
            raise KeyboardInterrupt
        return measuring.run(arguments, **settings)

    with pytest.raises(KeyboardInterrupt):
        rehearse(three, TINY, tmp_path, runner=killed)
    assert [path.stem for path in (tmp_path / "rows").iterdir()] == ["a"]
    found = rehearse(three, TINY, tmp_path)
    assert [(done.name, done.kept, done.why) for done in found] == [("a", True, ""), ("b", False, ""), ("c", False, "")]
    assert (tmp_path / "b.txt").read_text() == "x", "what the killed one left is gone"
    (again,) = rehearse(three, TINY, tmp_path, only=["b"])
    assert not again.kept


def test_a_failure_holds_up_what_needs_it(tmp_path):
    bad = replace(stage("bad"), command=("timeit", "-n1", "-r1", "raise ValueError('seven')"))

    def refused(out, rows):
        raise UserError("three is 3, wanted 4")

    unsound = replace(stage("unsound"), check=refused)
    four = [bad, stage("next", needs=("bad",)), stage("other"), unsound]
    found = {done.name: done for done in rehearse(four, TINY, tmp_path)}
    assert found["bad"].why == "ended with 1: ValueError: seven"
    assert found["next"].why == "not run: it needs bad"
    assert found["other"].why == ""
    assert found["unsound"].why == "three is 3, wanted 4"
    assert [path.stem for path in (tmp_path / "rows").iterdir()] == ["other"]


def test_a_process_is_measured_and_killed(tmp_path):
    code = "open('there', 'w').close(); time.sleep(60)"
    command = ["timeit", "-n1", "-r1", "-s", "import time; x = b'x' * 200_000_000", code]
    taken = measuring.run(command, tmp_path, tmp_path / "log", 60, kill=(tmp_path / "there").exists)
    assert taken.code == -9
    assert taken.seconds < 30
    assert 200e6 < taken.held < 260e6
    assert taken.held < taken.peak < 300e6
    assert measuring.run(command, tmp_path, tmp_path / "log", 0.5).code == -9, "it took longer than the longest"
    assert measuring.status(os.getpid())["VmHWM"] > measuring.status()["RssAnon"] > 0


# --- the rest ---


def test_the_real_folder_is_that_of_stable_diffusion():
    sizes = {name: sum(p.numel() for p in net.parameters()) for name, (net, _) in networks(REAL).items()}
    assert sizes == {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}


def test_limits_are_within_what_is_promised():
    every = stages(TINY)
    assert sum(stage.seconds for stage in every) <= 40 * 60
    assert max(stage.gib for stage in every) <= 20
    names = [stage.name for stage in every]
    assert len(set(names)) == len(names)
    for number, found in enumerate(every):
        assert set(found.needs) <= set(names[:number])


def test_the_page():
    who = {"suite": "real_size", "device": "a CPU", "threads": 2}
    took = {"case": "train", "provider": "ours", "metric": "seconds", "unit": "s", "value": 250.0, "held_gib": 15.5}
    took |= {"peak_gib": 20.25, "limit_s": 500, "limit_gib": 19, "found": {}, **who}
    ms = {"case": "sd21 dense b1", "provider": "ours", "metric": "ms", "unit": "ms", "p20": 900.0, "p80": 1100.0, **who}
    half = {**ms, "case": "half", "config": {"structure": "half", "gmacs": 50.0}}
    half |= {"metric": "realised_speedup", "value": 0.8, "p20": 0.75, "p80": 0.85}
    dense = {**ms, "value": 1000.0, "config": {"structure": "dense", "gmacs": 100.0}}
    found = {"predicted_gib": 15.0, "model": 13 * GIB, "besides": 2 * GIB, "held_by_train_gib": 15.5, "ratio": 0.97}
    model = {**took, "case": "memory model", "value": 9.0, "found": found}
    text = table.page(
        [took, dense, {**ms, **half, "metric": "ms", "value": 600.0, "p20": 590.0, "p80": 650.0}, half, model]
    )
    assert "| train | 250 | 500 | 15.5 | 19 | 20.2 |" in text
    assert "| half | 0.500 | 2.00 | 1.60 (1.50..1.70) | not measured | 600 (590..650) | not measured |" in text
    assert "predicts 15.0 GiB for the training (13.0 counted, 2.0 of libraries" in text
    assert table.page([]).count("not measured") == 3
