"""What becomes of a run when a rank is asked to stop, is killed, hangs, or was started in another way than the rest.

What is not marked takes seconds and is part of every run of the tests. The rest, under torchrun itself or many times
over, is `-m faults`; BILEVEL_FAST_KILLS says how many kills, BILEVEL_FAST_KILLED where they are gone on with.
"""

import contextlib
import json
import os
import random
import resource
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ranked
from bilevel_fast.base.files import write_json
from bilevel_fast.scale.watch import EVERY, LIMIT, PATIENCE
from bilevel_fast.train import main
from bilevel_fast.training import checkpoint
from commands import run_command
from ranked import Crew, ranks_of, start, torchrun
from short_runs import FLAGS, assert_same, records, until

ENDLESS = ["--lower.steps", "100000"]
BUSY = 10
"""Seconds that a busy machine may add to any time that is promised."""


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Of short trainings of a tiny student."""
    return [*FLAGS, "--teacher", str(ranked.teacher(tmp_path_factory.mktemp("faults")))]


@pytest.fixture(autouse=True)
def _nobody_is_left() -> Iterator[None]:
    """A test that fails leaves no process behind, running or stopped."""
    yield
    while Crew.begun:
        Crew.begun.pop().end()


def errors_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


def in_steps(out: Path, *flags: str, count: int = 2) -> Crew:
    """A run that has taken two steps."""
    crew = Crew(count, "train", *flags, *ENDLESS, "--out", out, log=out.with_suffix(".log"))
    until(crew.runs, lambda: len(records(out)) >= 2, crew.said)
    return crew


def step_saved(out: Path) -> int:
    (folder,) = (out / "checkpoints" / "student").glob("step-*")
    return int(folder.name.removeprefix("step-"))


@pytest.mark.situation
def test_sigterm_to_one_rank_stops_all_after_the_same_step(flags, tmp_path):
    """SIGTERM or Ctrl-C to one of several ranks: all stop after the same step, one saves, all exit with 0"""
    crew = in_steps(tmp_path / "run", *flags)
    crew.ranks[1].send(signal.SIGTERM)
    assert crew.wait() == [0, 0], crew.said()
    (said,) = [line for line in crew.said().splitlines() if line.startswith("stopped after lower step")]
    assert "--resume" in said
    assert step_saved(tmp_path / "run") == int(said.split()[4]) == records(tmp_path / "run")[-1]["step"]
    assert not errors_of(crew.said())


@pytest.mark.situation
def test_a_killed_rank_is_named_by_the_one_that_is_left(flags, tmp_path):
    """a rank is killed: one line by another names rank, machine and process, and all end within seconds"""
    crew, begun = in_steps(tmp_path / "run", *flags), time.monotonic()
    crew.ranks[1].send(signal.SIGKILL)
    assert crew.wait() == [2, -signal.SIGKILL]
    (line,) = errors_of(crew.said())
    assert line.startswith("error: rank 1, on ")
    assert f"process {crew.ranks[1].pid}, is gone: not a word for" in line
    print(f"all gone after {time.monotonic() - begun:.1f} s")
    assert time.monotonic() - begun <= PATIENCE + 3 * EVERY + BUSY


@pytest.mark.situation
@pytest.mark.parametrize("hangs", [0, 1])  # the first hosts what they talk through
def test_a_rank_that_hangs_is_named(flags, tmp_path, hangs):
    """a rank hangs, or its machine is cut off: the same, after ten seconds of silence"""
    crew, begun = in_steps(tmp_path / "run", *flags), time.monotonic()
    crew.ranks[hangs].send(signal.SIGSTOP)
    assert crew.ranks[1 - hangs].wait(60) == 2
    (line,) = errors_of(crew.said())
    assert line.startswith(f"error: rank {hangs}, on ")
    print(f"the other is gone after {time.monotonic() - begun:.1f} s")
    assert LIMIT - EVERY <= time.monotonic() - begun <= LIMIT + 3 * EVERY + BUSY


@pytest.mark.situation
def test_ranks_that_are_started_differently_are_refused_before_the_first_step(flags, tmp_path):
    """ranks are started with other flags, versions, weights or data: one line says which differs, before a step"""
    run, log = tmp_path / "run", tmp_path / "log"
    crew = Crew(2, "train", *flags, "--out", run, log=log, own={1: ["--lower.lr", "1e-3"]})
    assert crew.wait() == [2, 2]
    assert errors_of(crew.said()) == [
        "error: rank 1 differs from rank 0 in --lower.lr: 0.001, wanted 0.0003; start all ranks alike"
    ]
    assert not run.exists()


@pytest.mark.situation
def test_ranks_that_cannot_share_a_batch_are_refused(flags, tmp_path):
    """more ranks than parts of a batch: one line names --scale.leaves and the number that would do"""
    crew = Crew(2, "train", *flags, "--scale.leaves", "1", "--out", tmp_path / "run", log=tmp_path / "log")
    assert crew.wait() == [2, 2]
    assert errors_of(crew.said()) == [
        "error: --scale.leaves is 1: wanted a multiple of 2, the processes that share a batch"
    ]


@pytest.mark.situation
def test_restarts_that_could_not_succeed_are_refused(flags, tmp_path):
    """torchrun --max-restarts without the variable that makes them work: one line says which to set"""
    said = {"TORCHELASTIC_MAX_RESTARTS": "3"}
    crew = Crew(2, "train", *flags, "--out", tmp_path / "run", log=tmp_path / "log", environment=said)
    assert crew.wait() == [2, 2]
    assert errors_of(crew.said()) == [
        "error: torchrun has --max-restarts, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE is not 1: no restart would "
        "succeed; set it"
    ]


@pytest.mark.situation
@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two', wanted a number"),
        ("MASTER_ADDR", "", "MASTER_ADDR is not set; wanted the machine of rank 0, as torchrun says it"),
        ("MASTER_PORT", "http", "MASTER_PORT is 'http', wanted a number"),
    ],
)
def test_a_launcher_that_says_too_little(flags, tmp_path, variable, value, why):
    """ranks without what torchrun tells them, such as MASTER_ADDR: one line names the variable"""
    crew = Crew(1, "train", *flags, log=tmp_path / "log", environment={"WORLD_SIZE": "2"} | {variable: value})
    assert crew.wait() == [2]
    assert errors_of(crew.said()) == [f"error: {why}"]


@pytest.mark.situation
def test_a_port_in_use(flags, tmp_path):
    """the port where ranks are to meet is taken: one line says so, and nobody waits"""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        crew = Crew(1, "train", *flags, log=tmp_path / "log", environment={"WORLD_SIZE": "2", "MASTER_PORT": port})
        assert crew.wait() == [2]
    (line,) = errors_of(crew.said())
    assert line.startswith(f"error: rank 0 of 2 did not meet the others at 127.0.0.1:{port}: ")
    assert "in use" in line


@pytest.mark.situation
def test_a_disk_that_refuses_a_checkpoint_ends_all_with_one_line(flags, tmp_path):
    """the disk is full under several ranks: one line of the one that writes, the others end silently"""
    crew = in_steps(tmp_path / "run", *flags)
    resource.prlimit(crew.ranks[0].pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    crew.ranks[1].send(signal.SIGTERM)
    assert crew.wait() == [2, 2]
    (line,) = errors_of(crew.said())
    assert "not saved in" in line
    assert not list((tmp_path / "run" / "checkpoints" / "student").iterdir())


@pytest.mark.situation
def test_gradients_that_are_never_finite_end_all_with_one_line(tmp_path):
    """NaN on one rank: all skip that step, no bit moves; after --max-bad-steps of them all stop with one line"""
    crew = Crew(2, "ranked", tmp_path, "spoilt:4", log=tmp_path / "log", package="")
    assert crew.wait() == [2, 2]
    (line,) = errors_of(crew.said())
    assert line.startswith("error: the last 2 lower steps had a non-finite gradient and were skipped; stopped at lower")
    assert [row["step"] for row in records(tmp_path / "spoilt-2")] == [1, 2]


@pytest.mark.situation
def test_a_checkpoint_of_another_student_is_refused_by_all_with_one_line(tmp_path):
    """several ranks find a checkpoint of another student: one line says what does not fit"""
    weights = {"weight": torch.zeros(3)}
    checkpoint.save(tmp_path / "other" / "checkpoints", 1, weights, {}, {"step": 1})
    crew = Crew(2, "ranked", tmp_path, "guidance:2:other", log=tmp_path / "log", package="")
    assert crew.wait() == [2, 2]
    (line,) = errors_of(crew.said())
    assert line.startswith(f"error: checkpoint 1 in {tmp_path}/other/checkpoints does not fit this student: ")


def test_a_fault_of_one_rank_alone_is_said_with_its_number(tmp_path):
    """What it has found wrong, nobody else has; the others end silently."""
    crew = Crew(3, "ranked", tmp_path, "unreadable", log=tmp_path / "log", package="")
    assert crew.wait() == [2, 1, 2]
    assert errors_of(crew.said()) == ["error: rank 1: latents.bin: Input/output error"]


# ---- the long form


@contextlib.contextmanager
def under_torchrun(*flags: str, count: int = 2) -> Iterator:
    """An agent, and its ranks once there are records."""
    out = Path(flags[flags.index("--out") + 1])
    agent = start(count, "-m", "bilevel_fast.train", *flags)
    until(lambda: agent.poll() is None, lambda: len(records(out)) >= 2, lambda: agent.communicate()[0])
    yield agent, ranks_of(agent)
    assert agent.poll() is not None


@pytest.mark.faults
def test_two_ranks_of_torchrun_train_what_one_does_with_judging_and_all(flags, tmp_path):
    """And what a stop has interrupted on two, one goes on with."""
    whole, shared, parts = tmp_path / "whole", tmp_path / "shared", tmp_path / "parts"
    steps = [*flags, "--lower.steps", "20"]
    assert run_command(main, *steps, "--out", whole).returncode == 0
    done = torchrun(2, "-m", "bilevel_fast.train", *steps, "--out", shared)
    assert done.returncode == 0, done.stdout
    with under_torchrun(*steps, "--out", str(parts)) as (agent, ranks):
        os.kill(ranks[0], signal.SIGTERM)
        text, _ = agent.communicate()
        assert agent.returncode == 0, text
    assert step_saved(parts) < 20
    assert run_command(main, *steps, "--out", parts, "--resume").returncode == 0
    for out in (shared, parts):
        assert_same(out, whole)
    assert "stopped" not in done.stdout
    assert done.stdout.count("training student") == 1, "the first rank speaks for all"


@pytest.mark.faults
def test_the_first_rank_is_killed_under_torchrun(flags, tmp_path):
    with under_torchrun(*flags, *ENDLESS, "--out", str(tmp_path / "run")) as (agent, ranks):
        begun = time.monotonic()
        os.kill(ranks[0], signal.SIGKILL)
        text, _ = agent.communicate(timeout=120)
    (line,) = errors_of(text)
    assert line.startswith("error: rank 0, on ")
    assert "frame #" not in text
    print(f"all gone after {time.monotonic() - begun:.1f} s")
    assert time.monotonic() - begun <= PATIENCE + 3 * EVERY + BUSY
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


@pytest.mark.faults
def test_torchrun_starts_ranks_again_which_go_on_from_the_last_checkpoint(flags, tmp_path):
    """The same command, without --resume."""
    steps = [*flags, "--lower.steps", "16", "--checkpoint-every", "1"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run_command(main, *steps, "--out", whole).returncode == 0
    agent = start(2, "-m", "bilevel_fast.train", *steps, "--out", out, restarts=3)
    for wanted in (3, 8):
        until(lambda: agent.poll() is None, lambda n=wanted: len(records(out)) >= n, lambda: agent.communicate()[0])
        os.kill(ranks_of(agent)[wanted % 2], signal.SIGKILL)
    text, _ = agent.communicate(timeout=240)
    assert agent.returncode == 0, text
    assert text.count("resuming after lower step") == 2
    assert_same(out, whole)


@pytest.mark.faults
def test_ranks_of_torchrun_that_are_started_differently(flags, tmp_path):
    command = shlex.join([sys.executable, "-m", "bilevel_fast.train", *flags, "--out", str(tmp_path / "run")])
    done = torchrun(2, "bash", "-c", f"{command} $([ $RANK = 1 ] && echo --lower.lr 1e-3)", no_python=True)
    assert done.returncode != 0
    (line,) = errors_of(done.stdout)
    assert line.startswith("error: rank 1 differs from rank 0 in --lower.lr")


@pytest.mark.faults
def test_kill_any_rank_at_any_moment_and_go_on_with_any_number(tmp_path, capfd):
    """As often as that happens, the end has the bits of a run that nobody touched.

    Every kill is said. BILEVEL_FAST_KILLED names a folder where a test that was ended is gone on with.
    """
    kills = int(os.environ.get("BILEVEL_FAST_KILLS", "10"))
    place = Path(os.environ.get("BILEVEL_FAST_KILLED", tmp_path))
    place.mkdir(parents=True, exist_ok=True)
    steps = [*FLAGS, "--teacher", str(ranked.teacher(place)), "--lower.steps", "12", "--checkpoint-every", "1"]
    whole, count = place / "whole", place / "count.json"
    known = json.loads(count.read_text()) if count.exists() else {}
    tries, done, finished = (known.get(name, 0) for name in ("tries", "done", "finished"))
    started = time.monotonic()

    def resume(out: Path) -> list[str]:
        return ["--resume"] if (out / "config.json").exists() else []

    if not (whole / "summary.json").exists():
        assert run_command(main, *steps, "--out", whole, *resume(whole)).returncode == 0
    while done < kills:
        out, log, dice = place / f"run-{finished}", place / f"{tries}.log", random.Random(tries)
        crew = Crew(dice.choice((1, 2, 2, 4)), "train", *steps, "--out", out, *resume(out), log=log)
        wanted, more = len(records(out)), dice.randrange(5)  # none: while it starts
        while more and crew.runs() and len(records(out)) < wanted + more:
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.2 if more else 2.0))
        crew.ranks[dice.randrange(len(crew.ranks))].send(signal.SIGKILL)
        for rank in crew.ranks:
            rank.send(signal.SIGTERM)  # as torchrun does; who has not met the others yet would wait for minutes
        codes = crew.wait()
        assert set(codes) <= {0, 2, -signal.SIGKILL, -signal.SIGTERM}, crew.said()
        if (out / "summary.json").exists():
            assert_same(out, whole)
            finished += 1
        done += -signal.SIGKILL in codes
        tries += 1
        write_json(count, {"tries": tries, "done": done, "finished": finished})
        with capfd.disabled():
            taken = f"{tries} tries, {finished} runs done, {len(codes)} ranks at step {len(records(out))}"
            print(f"{done} of {kills} kills: {taken}; {time.monotonic() - started:.0f} s", flush=True)
    out = place / f"run-{finished}"
    crew = Crew(4, "train", *steps, "--out", out, *resume(out), log=place / "last.log")
    assert crew.wait() == [0] * 4, crew.said()
    assert_same(out, whole)
