"""One long run that is killed again and again, beside the same one that is not: equal weights, and nothing that grows.

    python -m benchmarks.soak                       2,000 steps of the mini world, 40 kills
    python -m benchmarks.soak --steps 200 --kills 4

Looked at four times a second, from outside: memory (`RssAnon`), open descriptors, and the run folder without its logs,
which grow by a line each step. A long process may hold no more in its last quarter than in its second one, by medians
and but for the limits below; the folder of the run that is killed may hold no more than that of the other, but for a
checkpoint that was being written. At the end nothing half-made is left, and the student's weights are the same bytes.
"""

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.machine import describe
from benchmarks.real_size.measuring import environment, status
from benchmarks.rows import Row, append_rows
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError

MEMORY = 32 * 2**20
"""Bytes by which a process may grow."""
DESCRIPTORS = 0
DISK = 2**20
"""Bytes by which the folder of a run may grow."""
EVERY = 0.25
"""Seconds between two looks."""
STUDENT = "student/unet/diffusion_pytorch_model.safetensors"
ROWS = RESULTS / "soak.jsonl"


@dataclass(frozen=True)
class Settings:
    """Settings of the long run."""

    steps: int = 2000
    """Lower steps of either run."""
    kills: int = 40
    """How often one of them is killed."""
    seed: int = 0
    """Of the moments."""
    rows: Path | None = None
    """Append the row to this file."""


@dataclass
class Held:
    """What was seen of a run: (step, memory, descriptors, disk) each time."""

    seen: list[tuple[int, int, int, int]] = field(default_factory=list)

    def growth(self, column: int, steps: int) -> int:
        """What the last quarter of the steps holds, less what the second one holds: medians."""
        quarters = [[look[column] for look in self.seen if low <= 4 * look[0] / steps < low + 1] for low in (1, 3)]
        if not all(quarters):
            raise UserError(f"the run was too short to be looked at: {len(self.seen)} looks; wanted more --steps")
        return round(median(quarters[1]) - median(quarters[0]))  # a checkpoint that is being written comes and goes

    def most(self, column: int) -> int:
        return max(look[column] for look in self.seen)


def size(folder: Path) -> int:
    """Bytes of all files but logs; those that vanish meanwhile do not count."""
    total = 0
    for path in folder.rglob("*"):
        try:
            log = path.suffix == ".jsonl" or path.suffix == ".html" or "events" in path.parts
            total += 0 if log or not path.is_file() else path.stat().st_size
        except OSError:
            continue
    return total


def steps_done(out: Path) -> int:
    stats = out / "stats.jsonl"
    return stats.read_bytes().count(b"\n") if stats.exists() else 0


_stop = threading.Event()
"""Both runs end with this process."""


def session(command: list[str], out: Path, held: Held, goal: float, delay: float) -> int:
    """One process, killed `delay` seconds after it has reached a step; its exit status.

    Args:
        held: Gets what is seen of it.
        goal: The step; infinity never comes.
    """
    due = math.inf
    with out.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, stdout=log, stderr=log,
            env={**environment(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        while process.poll() is None and not _stop.is_set():
            done, now = steps_done(out), time.perf_counter()
            with contextlib.suppress(OSError, KeyError):  # it has ended meanwhile
                opened = len(os.listdir(f"/proc/{process.pid}/fd"))
                held.seen.append((done, status(process.pid)["RssAnon"], opened, size(out)))
            if done >= goal:
                due = min(due, now + delay)
            if now >= due:
                process.kill()
            time.sleep(min(EVERY, max(0.01, due - now)))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    return process.returncode


def train(out: Path, settings: Settings, kills: int, held: Held) -> None:
    """Train to the end, killed so often at moments that are drawn, some of them while it starts.

    Raises:
        UserError: A session ended by itself, and not well.
    """
    dice, done = random.Random(settings.seed), 0
    command = [
        "bilevel_fast.train", "--preset", "smoke", "--no-twin", "--lower.steps", str(settings.steps),
        "--log-every", "1", "--checkpoint-every", "10", "--device", "cpu", "--out", str(out),
    ]  # fmt: skip
    while True:
        goal = (done + dice.random()) * settings.steps / kills if done < kills else math.inf
        again = ["--resume"] if (out / "config.json").exists() else []
        code = session([*command, *again], out, held, goal, dice.uniform(0, 3))
        if code == 0 or _stop.is_set():
            return
        if code != -signal.SIGKILL:
            raise UserError(f"a session ended with exit code {code}: {out.with_suffix('.log').read_text()[-2000:]}")
        done += 1


def measure(settings: Settings, folder: Path) -> tuple[Row, list[str]]:
    """Both runs at a time; the row, and what is not as it should be."""
    start, helds, failures = time.perf_counter(), [Held(), Held()], list[BaseException]()

    def go(number: int) -> None:
        try:
            train(folder / f"run-{number}", settings, number * settings.kills, helds[number])
        except BaseException as error:
            failures.append(error)
            _stop.set()

    threads = [threading.Thread(target=go, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        _stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    whole, broken = helds
    checkpoint = max(size(path) for path in (folder / "run-0" / "checkpoints" / "student").glob("step-*"))
    grown = [whole.growth(column, settings.steps) for column in (1, 2, 3)]
    found = {
        "memory_grown": grown[0], "descriptors_grown": grown[1], "disk_grown": grown[2],
        "disk_over_unbroken": broken.most(3) - whole.most(3),
    }  # fmt: skip
    limits = {"memory_grown": MEMORY, "descriptors_grown": DESCRIPTORS, "disk_grown": DISK}
    limits["disk_over_unbroken"] = checkpoint
    wrong = [f"{name} is {value}, limit {limits[name]}" for name, value in found.items() if value > limits[name]]
    if (folder / "run-0" / STUDENT).read_bytes() != (folder / "run-1" / STUDENT).read_bytes():
        wrong.append("the weights of the run that was killed are others")
    left = [str(path) for path in (folder / "run-1").rglob(".*") if path.name != ".lock"]
    wrong += [f"{left[0]} is left"] if left else []
    row = {
        "suite": "soak", "case": "mini world", "provider": "ours", "metric": "seconds", "unit": "s",
        "value": round(time.perf_counter() - start, 1), "steps": settings.steps, "kills": settings.kills,
        "memory": whole.most(1), "descriptors": whole.most(2), "disk": whole.most(3), **found, "limits": limits,
        "command": f"python -m benchmarks.soak --steps {settings.steps} --kills {settings.kills}",
        **describe(torch.device("cpu")),
    }  # fmt: skip
    return row, wrong


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.soak", __doc__)
    if settings.steps < 1 or settings.kills < 1:
        raise UserError(f"--steps {settings.steps} --kills {settings.kills}: wanted at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as folder:
        row, wrong = measure(settings, Path(folder))
    print(json.dumps(row, indent=2))
    if wrong:
        raise SystemExit("\n".join(wrong))
    if settings.rows is not None:
        append_rows(settings.rows, [row])


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
