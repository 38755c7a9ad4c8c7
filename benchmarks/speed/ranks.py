"""Weak scaling of a lower step on this machine: as many images for each of 1, 2, ... ranks.

    python -m benchmarks.speed.ranks                                                  one rank
    torchrun --standalone --nproc-per-node 2 -m benchmarks.speed.ranks                two

The mini world's UNets in fp32 over gloo, a leaf a rank. Ranks share one machine's memory and caches, and whatever else
runs there: that checks the formula of `benchmarks.counts.scaling`, and says nothing of GPUs or networks.

    ms               of a step, median
    collectives_ms   of it, in which nothing but collectives went on: bytes, and the wait for the slowest rank
    sent_mb          by a rank, counted where it is sent
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from bilevel_fast.base import errors, flags
from bilevel_fast.base.devices import Ranks
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import load_folder
from bilevel_fast.runs.assemble import levels
from bilevel_fast.runs.session import gather, initial_student
from bilevel_fast.scale.team import Pending, Team
from bilevel_fast.train import parse
from bilevel_fast.training.levels import descend
from bilevel_fast.worlds.mini import TEACHER

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    images: int = 4
    """For each rank and step."""
    steps: int = 10
    """Steps that count, after two that do not."""


class Timed(Team):
    """Counts what its collectives send, and how long they take."""

    seconds, sent = 0.0, 0

    @contextmanager
    def _timed(self, sent: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start
        self.sent += sent

    def exchange(self, out: Tensor, x: Tensor) -> Pending:
        return self._waited(super().exchange, out, x, x.nbytes * (self.world - 1) // self.world)

    def gather(self, out: Tensor, x: Tensor) -> Pending:
        return self._waited(super().gather, out, x, x.nbytes * (self.world - 1))

    def _waited(self, call: Callable[[Tensor, Tensor], Pending], out: Tensor, x: Tensor, sent: int) -> Pending:
        with self._timed(sent):
            pending = call(out, x)
        return _Waited(self, pending)


@dataclass(frozen=True)
class _Waited:
    team: Timed
    pending: Pending

    def wait(self) -> None:
        with self.team._timed(0):
            self.pending.wait()


def measure(settings: Settings, team: Timed) -> Row:
    """Take steps, all ranks together."""
    batch, device = settings.images * team.world, torch.device("cpu")
    words = ["--preset", "smoke", "--upper.every", "0", "--precision", "fp32", "--device", "cpu"]
    config = parse([*words, "--lower.batch", str(batch), "--scale.leaves", str(team.world)])
    folder = load_folder(TEACHER)
    student, teacher = initial_student(config, folder, align=1), folder.unet().requires_grad_(False)
    materials = gather(config, folder, teacher, [], config.out, record=False)
    lower, _ = levels(config, student, materials, device, team=team)
    found, inside = list[float](), list[float]()
    with lower.batches:  # pyright: ignore[reportGeneralTypeIssues]  # those of a run are a Loader
        for step in range(settings.steps + 2):
            team.least(0)  # all begin together
            team.seconds, team.sent, start = 0.0, 0, time.perf_counter()
            descend(lower, step)
            found.append(1e3 * (time.perf_counter() - start))
            inside.append(1e3 * team.seconds)
    return {
        "suite": "ranks", "case": "mini", "provider": "ours", "metric": "ms", "ranks": team.world,
        "images_per_rank": settings.images, "value": round(statistics.median(found[2:]), 1), "unit": "ms",
        "collectives_ms": round(statistics.median(inside[2:]), 1), "sent_mb": round(team.sent / 1e6, 1),
    }  # fmt: skip


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.speed.ranks", __doc__)
    for flag, value in (("--images", settings.images), ("--steps", settings.steps)):
        if value < 1:
            raise UserError(f"{flag} is {value}, wanted at least 1")
    with Timed.join(Ranks.from_environment()) as team:
        row = measure(settings, team)
    if team.rank == 0:
        print(json.dumps(row | describe(torch.device("cpu"))))


if __name__ == "__main__":
    sys.exit(errors.run(main))
