"""Short trainings of a tiny student, whose processes meet with something."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bilevel_fast.models.folder import load_folder

FLAGS = [
    *["--preset", "smoke", "--no-twin", "--scale.leaves", "4", "--lower.batch", "4", "--upper.batch", "4"],
    *["--upper.every", "2", "--log-every", "1", "--checkpoint-every", "100000"],
    *["--mini.judge-erased", "2", "--mini.judge-kept", "1", "--mini.judge-steps", "2"],
]


def records(out: Path) -> list[dict]:
    stats = out / "stats.jsonl"
    return [json.loads(line) for line in stats.read_text().splitlines()] if stats.exists() else []


def until(alive: Callable[[], object], done: Callable[[], object], said: Callable[[], str]) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert alive(), said()
        assert time.monotonic() < deadline, said()
        time.sleep(0.02)


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_folder(out / "student").unet().state_dict()


def assert_same(out: Path, whole: Path) -> None:
    first, second = weights_of(whole), weights_of(out)
    assert all(torch.equal(first[name], second[name]) for name in first)
    qualities = [json.loads((path / "summary.json").read_text())["quality"] for path in (whole, out)]
    assert qualities[0] == qualities[1]
