"""What becomes of a run when a rank is asked to stop, is killed, hangs, or was started in another way than the rest."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ranked
from bilevel_fast.models.folder import load_folder
from bilevel_fast.scale.watch import LIMIT
from bilevel_fast.train import main
from commands import run_command
from ranked import ranks_of, start, torchrun

SMALL = "--preset smoke --no-twin --scale.leaves 2 --lower.batch 2 --upper.batch 2 --log-every 1"
JUDGED = "--mini.judge-erased 2 --mini.judge-kept 1 --mini.judge-steps 2 --checkpoint-every 100000"
FLAGS = [*SMALL.split(" "), *JUDGED.split(" ")]
TRAIN = ["-m", "bilevel_fast.train", *FLAGS]
ENDLESS = ["--lower.steps", "100000"]
WITHIN = LIMIT + 5
"""Seconds in which nobody is left of a run that has lost a rank."""


def records(out: Path) -> list[dict]:
    stats = out / "stats.jsonl"
    return [json.loads(line) for line in stats.read_text().splitlines()] if stats.exists() else []


def until(agent: subprocess.Popen[str], done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert agent.poll() is None, agent.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def errors_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def in_steps(out: Path, count: int = 2, *flags: str) -> tuple[subprocess.Popen[str], dict[int, int]]:
    """A run that has taken two steps, and its processes by rank."""
    agent = start(count, *TRAIN, *ENDLESS, *flags, "--out", out)
    until(agent, lambda: len(records(out)) >= 2)
    return agent, ranks_of(agent)


def ended(agent: subprocess.Popen[str], ranks: dict[int, int]) -> tuple[str, float]:
    """What was said, and how long it took until all were gone."""
    begun = time.monotonic()
    text, _ = agent.communicate(timeout=120)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    return text, time.monotonic() - begun


def test_sigterm_to_one_rank_stops_all_after_the_same_step(tmp_path):
    agent, ranks = in_steps(tmp_path / "run")
    os.kill(ranks[1], signal.SIGTERM)
    text, _ = ended(agent, ranks)
    assert agent.returncode == 0, text
    (said,) = [line for line in text.splitlines() if line.startswith("stopped after lower step")]
    step = int(said.split()[4])
    assert "--resume" in said
    assert outcome_step(tmp_path / "run") == step == records(tmp_path / "run")[-1]["step"]
    assert not errors_of(text)


def outcome_step(out: Path) -> int:
    (folder,) = (out / "checkpoints" / "student").glob("step-*")
    return int(folder.name.removeprefix("step-"))


def test_a_killed_rank_is_named_by_the_one_that_is_left(tmp_path):
    agent, ranks = in_steps(tmp_path / "run")
    os.kill(ranks[1], signal.SIGKILL)
    text, seconds = ended(agent, ranks)
    assert agent.returncode != 0
    (line,) = errors_of(text)
    assert line.startswith("error: rank 1, on ")
    assert f"process {ranks[1]}, is gone: not a word for" in line
    assert seconds <= WITHIN + 5, "torchrun takes a moment, too"


def test_ranks_that_are_started_differently_are_refused_before_the_first_step(tmp_path):
    """By name of what differs; and there is no run folder then."""
    command = shlex.join([sys.executable, *TRAIN, "--out", str(tmp_path / "run")])
    done = torchrun(2, "bash", "-c", f"{command} $([ $RANK = 1 ] && echo --lower.lr 1e-3)", no_python=True)
    assert done.returncode != 0
    assert errors_of(done.stdout) == [
        "error: rank 1 differs from rank 0 in --lower.lr: 0.001, wanted 0.0003; start all ranks alike"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_two_ranks_train_what_one_does_with_judging_and_all(tmp_path):
    """And what a stop has interrupted on two, one goes on with."""
    whole, shared, parts = tmp_path / "whole", tmp_path / "shared", tmp_path / "parts"
    steps = ["--lower.steps", "40"]
    assert run_command(main, *FLAGS, *steps, "--out", whole).returncode == 0
    done = torchrun(2, *TRAIN, *steps, "--out", shared)
    assert done.returncode == 0, done.stdout
    agent = start(2, *TRAIN, *steps, "--out", parts)
    until(agent, lambda: len(records(parts)) >= 3)
    os.kill(ranks_of(agent)[0], signal.SIGTERM)
    text, _ = agent.communicate()
    assert agent.returncode == 0, text
    assert outcome_step(parts) < 40
    assert run_command(main, *FLAGS, *steps, "--out", parts, "--resume").returncode == 0
    expected = json.loads((whole / "summary.json").read_text())["quality"]
    for out in (shared, parts):
        assert json.loads((out / "summary.json").read_text())["quality"] == expected
        first, second = (load_folder(path / "student").unet().state_dict() for path in (whole, out))
        assert all((first[name] == second[name]).all() for name in first)
    assert "stopped" not in done.stdout
    assert done.stdout.count("training student") == 1, "the first rank speaks for all"


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_named(tmp_path, rank):
    agent, ranks = in_steps(tmp_path / "run")
    os.kill(ranks[rank], signal.SIGSTOP)
    time.sleep(WITHIN)
    assert not Path(f"/proc/{ranks[1 - rank]}/fd/0").exists(), "the other one has ended"
    os.kill(ranks[rank], signal.SIGKILL)
    text, _ = ended(agent, ranks)
    assert any(line.startswith(f"error: rank {rank}, on ") for line in errors_of(text)), text


@pytest.mark.faults
def test_the_first_rank_is_killed(tmp_path):
    agent, ranks = in_steps(tmp_path / "run", 2)
    os.kill(ranks[0], signal.SIGKILL)
    text, seconds = ended(agent, ranks)
    (line,) = errors_of(text)
    assert line.startswith("error: rank 0, on ")
    assert seconds <= WITHIN + 5


@pytest.mark.faults
def test_a_full_disk_on_the_first_rank_ends_all_with_its_line(tmp_path):
    """The folder of checkpoints is a file: nothing can be saved there."""
    agent, ranks = in_steps(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "run" / "checkpoints" / "student").write_text("")
    os.kill(ranks[1], signal.SIGTERM)
    text, seconds = ended(agent, ranks)
    (line,) = errors_of(text)
    assert "not saved in" in line
    assert seconds <= WITHIN


@pytest.mark.faults
def test_gradients_that_are_never_finite_end_all_with_one_line(tmp_path):
    done = torchrun(2, ranked.__file__, tmp_path, "spoilt:4")
    assert done.returncode != 0
    (line,) = errors_of(done.stdout)
    assert line.startswith("error: the last 2 lower steps had a non-finite gradient and were skipped; stopped at lower")
    assert [row["step"] for row in records(tmp_path / "spoilt-2")] == [1, 2]


@pytest.mark.faults
def test_kill_any_rank_at_any_moment_and_go_on_with_any_number(tmp_path):
    """As often as that happens, the end has the bits of a run that nobody touched."""
    whole, out, dice = tmp_path / "whole", tmp_path / "run", random.Random(0)
    flags = [*FLAGS, "--lower.steps", "40", "--scale.leaves", "4", "--lower.batch", "4", "--upper.batch", "4"]
    flags += ["--checkpoint-every", "2"]
    assert run_command(main, *flags, "--out", whole).returncode == 0
    for count in (4, 2, 4, 1, 2):
        resume = ["--resume"] if (out / "config.json").exists() else []
        wanted = len(records(out)) + 3
        agent = start(count, "-m", "bilevel_fast.train", *flags, "--out", out, *resume)
        until(agent, lambda wanted=wanted: len(records(out)) >= wanted)
        os.kill(ranks_of(agent)[dice.randrange(count)], signal.SIGKILL)
        agent.communicate(timeout=120)
    done = torchrun(4, "-m", "bilevel_fast.train", *flags, "--out", out, "--resume")
    assert done.returncode == 0, done.stdout
    first, second = (load_folder(path / "student").unet().state_dict() for path in (whole, out))
    assert all((first[name] == second[name]).all() for name in first)
