"""`kill -9` at any moment, then `--resume`: the run ends with the same bits as one that nobody touched."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from forked import Started

# small steps, a checkpoint after each: many different moments to be killed at in little time
FLAGS = [
    "--preset", "smoke", "--lower.steps", "24", "--lower.batch", "2", "--upper.batch", "2", "--checkpoint-every", "1",
    "--log-every", "1", "--mini.judge-erased", "2", "--mini.judge-kept", "1", "--mini.judge-steps", "2",
]  # fmt: skip
Start = Callable[..., Started]
KILLS = (
    40 if "SOAK" in os.environ else 5
)  # some hit the start, some a step; `tests/faults` kills at every kind of write


@pytest.fixture(scope="module")
def start(small_teacher) -> Start:
    def start(out: Path, *more: str) -> Started:
        return Started("train", *FLAGS, "--teacher", small_teacher, "--out", out, *more, log=out.with_suffix(".log"))

    return start


def outcome(out: Path) -> dict[str, bytes]:
    """Everything that must not depend on how often the run was killed."""
    files = {name: (out / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("student", "distilled")}
    files["picture"] = out / "samples" / "comparison.png"
    found = {name: path.read_bytes() for name, path in files.items()}
    summary = json.loads((out / "summary.json").read_text())
    found["summary"] = json.dumps([summary[k] for k in ("quality", "macs", "lower_steps", "upper_steps")]).encode()
    rows = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"], row["images_per_second"]
    found["stats"] = json.dumps(rows).encode()
    return found


@pytest.fixture(scope="module")
def untouched(start, tmp_path_factory) -> tuple[dict[str, bytes], float]:
    """The outcome of a run in one piece, and the seconds until its first step was done."""
    out = tmp_path_factory.mktemp("untouched") / "run"
    Started("train", "--dry-run", log=out.with_suffix(".dry")).wait()  # the server they are forked from is up
    process, begin = start(out), time.monotonic()
    wait_for_records(process, out, 1)
    startup = time.monotonic() - begin
    assert process.wait() == 0, process.said()
    return outcome(out), startup


def records(out: Path) -> int:
    stats = out / "stats.jsonl"
    return stats.read_text().count("\n") if stats.exists() else 0


def wait_for_records(process: Started, out: Path, count: int) -> None:
    while records(out) < count:
        assert process.runs(), process.said()
        time.sleep(0.02)


def killed(process: Started, out: Path, dice: random.Random, startup: float) -> bool:
    """Kill at some moment of the start-up, or within some step of the next few; False if the run was done before.

    Steps are seen, not timed: on a busy machine they take as long as they take.
    """
    steps, before = dice.randrange(7), records(out)
    while steps and process.runs() and records(out) < before + steps:
        time.sleep(0.005)
    time.sleep(dice.uniform(0.0, 0.1 if steps else startup))
    process.send(signal.SIGKILL)
    status = process.wait()
    assert status in (0, -signal.SIGKILL), process.said()
    return status != 0


@pytest.mark.slow
def test_kills_change_nothing(start, untouched, tmp_path):
    """When a run is finished in spite of them, another one begins."""
    expected, startup = untouched
    dice, kills, stages = random.Random(0), 0, set()
    for number in range(KILLS):
        out = tmp_path / f"run-{number}"
        finished = False
        while not finished:
            resume = ["--resume"] if (out / "config.json").exists() else []
            process = start(out, *resume)
            if kills == KILLS:
                assert process.wait() == 0, process.said()
                finished = True
            elif killed(process, out, dice, startup):
                kills += 1
                stages.add(tuple(sorted(str(path) for path in out.glob("checkpoints/*/step-*"))))
            else:
                finished = True
        assert outcome(out) == expected
        if kills == KILLS:
            break
    assert kills == KILLS
    assert len(stages) >= KILLS // 3, "the kills must come at different stages"


@pytest.mark.slow
def test_sigterm_saves_and_resumes(start, untouched, tmp_path):
    expected, _ = untouched
    out = tmp_path / "run"
    process = start(out, "--checkpoint-every", "1000")
    wait_for_records(process, out, 3)
    process.send(signal.SIGTERM)
    assert process.wait() == 130
    assert "stopped after lower step" in process.said()
    assert "--resume" in process.said()
    checkpoints = sorted((out / "checkpoints" / "student").glob("step-*"))
    assert len(checkpoints) == 1
    assert load_file(checkpoints[0] / "model.safetensors")
    again = start(out, "--resume")
    assert again.wait() == 0, again.said()
    assert outcome(out) == expected
