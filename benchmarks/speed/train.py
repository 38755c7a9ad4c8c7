"""A whole run of the built-in world, as a user starts it: time, peak memory, and what came out.

python -m benchmarks.speed.train                          runs `python -m bilevel_fast.train` once and prints the row
python -m benchmarks.speed.train --out benchmarks/results/train_cpu.jsonl
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import write_atomic


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    preset: str = "mini"
    """Of the run: mini, or smoke to rehearse."""
    out: Path | None = None
    """Write the row to this file, in place of what is there."""


def measure(preset: str) -> dict[str, Any]:
    """Run once. Raises UserError if the run fails; its own message is on standard error."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        command = [sys.executable, "-m", "bilevel_fast.train", "--preset", preset, "--device", "cpu", "--out", str(out)]
        start = time.perf_counter()
        code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        seconds = time.perf_counter() - start
        if code:
            raise UserError(f"the run ended with exit code {code}")
        summary = json.loads((out / "summary.json").read_text())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of the largest child; kilobytes on Linux
    row = {"suite": "train", "case": preset, "provider": "ours", "metric": "seconds", "value": seconds, "unit": "s"}
    return {**row, "peak_gib": peak, "summary": summary, **describe(torch.device("cpu"))}


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.speed.train", __doc__)
    line = json.dumps(measure(settings.preset))
    print(line)
    if settings.out is not None:
        write_atomic(settings.out, f"{line}\n".encode())


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
