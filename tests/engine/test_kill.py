"""`kill -9` at any moment, then `--resume`: the run ends with the same bits as one that nobody touched."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

# small steps, a checkpoint after each: many different moments to be killed at in little time
FLAGS = [
    "--preset", "smoke", "--lower.steps", "24", "--lower.batch", "2", "--upper.batch", "2", "--checkpoint-every", "1",
    "--log-every", "1", "--mini.judge-erased", "2", "--mini.judge-kept", "1", "--mini.judge-steps", "2",
]  # fmt: skip
KILLS = 20


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "bilevel_fast.train", *FLAGS, "--out", str(out), *more]


def outcome(out: Path) -> dict[str, bytes]:
    """Everything that must not depend on how often the run was killed."""
    files = {name: (out / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("student", "distilled")}
    files["picture"] = out / "samples" / "comparison.png"
    found = {name: path.read_bytes() for name, path in files.items()}
    summary = json.loads((out / "summary.json").read_text())
    found["summary"] = json.dumps([summary[k] for k in ("quality", "macs", "lower_steps", "upper_steps")]).encode()
    records = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"], record["images_per_second"]
    found["stats"] = json.dumps(records).encode()
    return found


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> tuple[dict[str, bytes], float, float]:
    """The outcome of a run in one piece, the seconds until its first step was done, and those from there to the end."""
    out, start = tmp_path_factory.mktemp("untouched") / "run", time.monotonic()
    process = subprocess.Popen(command(out), stderr=subprocess.PIPE, text=True)
    wait_for_records(process, out, 1)
    began = time.monotonic()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return outcome(out), began - start, time.monotonic() - began


def wait_for_records(process: subprocess.Popen[str], out: Path, count: int) -> None:
    stats = out / "stats.jsonl"
    while not stats.exists() or stats.read_text().count("\n") < count:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)


@pytest.mark.slow
def test_twenty_kills_change_nothing(untouched, tmp_path):
    """Each session is killed after its start-up and a few steps more; when a run is finished, another one begins."""
    expected, startup, work = untouched
    dice, kills, stages = random.Random(0), 0, set()
    for number in range(KILLS):
        out = tmp_path / f"run-{number}"
        finished = False
        while not finished:
            resume = ["--resume"] if (out / "config.json").exists() else []
            process = subprocess.Popen(
                command(out, *resume), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            patience = startup * dice.uniform(0.7, 1.0) + work * dice.uniform(0.0, 0.25) if kills < KILLS else None
            try:
                _, errors = process.communicate(timeout=patience)
                assert process.returncode == 0, errors
                finished = True
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                stages.add(tuple(sorted(str(path) for path in out.glob("checkpoints/*/step-*"))))
        assert outcome(out) == expected
        if kills == KILLS:
            break
    assert kills == KILLS
    assert len(stages) >= 5, "the kills must come at different stages"


@pytest.mark.slow
def test_sigterm_saves_and_resumes(untouched, tmp_path):
    expected, *_ = untouched
    out = tmp_path / "run"
    process = subprocess.Popen(command(out, "--checkpoint-every", "1000"), stderr=subprocess.PIPE, text=True)
    wait_for_records(process, out, 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "stopped after lower step" in errors
    assert "--resume" in errors
    checkpoints = sorted((out / "checkpoints" / "student").glob("step-*"))
    assert len(checkpoints) == 1
    assert load_file(checkpoints[0] / "model.safetensors")
    subprocess.run(command(out, "--resume"), check=True, capture_output=True)
    assert outcome(out) == expected


@pytest.mark.slow
def test_a_folder_in_use_is_refused(tmp_path):
    out = tmp_path / "run"
    first = subprocess.Popen(command(out), stderr=subprocess.PIPE, text=True)
    while not (out / "config.json").exists():
        time.sleep(0.05)
    second = subprocess.run(command(out, "--resume"), capture_output=True, text=True, check=False)
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert second.stderr.startswith("error: ")
    assert str(first.pid) in second.stderr
