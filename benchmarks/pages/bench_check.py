"""Did anything get worse? What a pull request is held to, on any machine.

    python -m benchmarks.pages.bench_check                         every part, against benchmarks/results/baseline.jsonl
    python -m benchmarks.pages.bench_check --skip compile_matrix   without the part that takes minutes
    python -m benchmarks.pages.bench_check --write                 renew the baseline of this machine

    macs             multiply-accumulates of SD 2.1, dense and cut evenly to 0.80 and 0.55, and of SDXL's family; exact
    launches         kernels per lower and per upper step (benchmarks.counts.launches); the same on every machine
    compile_matrix   every kernel as compiled for every card, against its own committed table
    step             the lower step against the released way on one CPU thread: the ratio, since milliseconds drift
    gpu              the rows that the baseline holds of this very card; nothing where there is no GPU

Timings are compared with a baseline of the same device only; where there is none, they are listed and not judged.
Exits with 1 if a row is worse, a count is gone, or a part fails.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from benchmarks import RESULTS, ROOT
from benchmarks.kernels import compile_matrix
from benchmarks.kernels.cases import OPS
from benchmarks.machine import describe
from benchmarks.pages.compare import compare, failed, table
from benchmarks.rows import Row, device, parse, read
from benchmarks.structures import structure
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import write_atomic
from bilevel_fast.models.macs import count
from bilevel_fast.models.sdxl import SDXL_FAMILY
from bilevel_fast.models.structure import Structure

BASELINE = RESULTS / "baseline.jsonl"
LATENT, TEXT = 64, 77
EXACT = ("macs", "launches")  # suites whose rows every machine has: one that is gone is a failure
RATIO = "times_faster_than_released"
MODULES = {"step": "benchmarks.speed.step", "kernels": "benchmarks.kernels.sweep"}  # that print the rows of a suite

Part = Literal["macs", "launches", "compile_matrix", "step", "gpu"]


@dataclass(frozen=True)
class Settings:
    """Settings of the check."""

    only: tuple[Part, ...] = ()
    """Run these parts only."""
    skip: tuple[Part, ...] = ()
    """Leave these parts out."""
    write: bool = False
    """Make what is measured the baseline, in place of the rows of the same parts and devices."""
    baseline: Path = BASELINE
    """Rows to hold the new ones against."""
    out: Path | None = None
    """Write the new rows to this file."""
    rounds: int = 20
    """Rounds of the timings."""
    tolerance: float = 0.03
    """Share by which a value may get worse."""


@dataclass(frozen=True)
class Found:
    """What a part found: rows to compare, lines to print below the table, and complaints: each is a failure."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def macs(settings: Settings, baseline: list[Row]) -> Found:
    where = describe(torch.device("cpu")) | {"device": "any machine", "threads": None}
    rows = []
    cases = [(f"sd21 {name}", structure(name), LATENT) for name in ("dense", "0.80", "0.55")]
    cases += [(name, Structure.dense(config), config.sample_size) for name, config in SDXL_FAMILY.items()]
    for case, kept, latent in cases:
        found = count(kept, latent, TEXT)
        shared = {
            "suite": "macs",
            "case": case,
            "provider": "closed form",
            "config": {"latent": latent, "text": TEXT},
        }
        for metric, value, unit in (
            ("macs", found.true, "MAC"),
            ("official_macs", found.official, "MAC"),
            ("params", found.params, "parameters"),
        ):
            rows.append({**shared, "metric": metric, "value": value, "unit": unit, **where})
    return Found(rows)


def launches(settings: Settings, baseline: list[Row]) -> Found:
    from benchmarks.counts.launches import measure

    return Found(measure(torch.device("cpu")))


def compiled(settings: Settings, baseline: list[Row]) -> Found:
    rows = compile_matrix.compile_all(OPS)
    complaints = compile_matrix.check(rows, compile_matrix.load())
    good = f"compile_matrix: {len(rows)} compiled kernels, none worse than the committed table"
    return Found(notes=[] if complaints else [good], complaints=[f"compile_matrix: {line}" for line in complaints])


def step(settings: Settings, baseline: list[Row]) -> Found:
    rows = run("step", "--device", "cpu", "--peers", "released", "--rounds", str(settings.rounds), threads=1)
    ratios = [row for row in rows if row.get("metric") == RATIO]
    if not ratios:
        raise UserError(f"benchmarks.speed.step printed no row of {RATIO}")
    return Found(ratios)


def gpu(settings: Settings, baseline: list[Row]) -> Found:
    if not torch.cuda.is_available():
        return Found(notes=["gpu: not measured, this machine has no GPU"])
    card = torch.cuda.get_device_name()
    known = {row["suite"] for row in baseline if row.get("device") == card}
    suites = [suite for suite in MODULES if suite in known or settings.write]
    if not suites:
        return Found(notes=[f"gpu: not measured, the baseline has no row of {card}; --write adds them"])
    rounds = str(settings.rounds)
    return Found([row for suite in suites for row in run(suite, "--device", "cuda", "--rounds", rounds)])


PARTS: dict[Part, Callable[[Settings, list[Row]], Found]] = {
    "macs": macs,
    "launches": launches,
    "compile_matrix": compiled,
    "step": step,
    "gpu": gpu,
}
assert tuple(PARTS) == get_args(Part)


def run(suite: str, *arguments: str, threads: int | None = None) -> list[Row]:
    """The rows of a suite in `MODULES`: what `python -m MODULE --json` prints, in a process of its own.

    Raises:
        UserError: It failed; its last line is quoted.
    """
    command = [sys.executable, "-m", MODULES[suite], "--json", *arguments]
    env = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    shown = " ".join(command[1:])
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise UserError(f"python {shown} ended with {done.returncode}: {last}")
    lines = done.stdout.splitlines()
    return [parse(line, f"python {shown}, line {n}") for n, line in enumerate(lines, 1) if line.startswith("{")]


def belongs(row: Row, part: Part) -> bool:
    """Whether a row of the baseline is what the part measures again on this machine."""
    if part == "gpu":
        return torch.cuda.is_available() and row.get("device") == torch.cuda.get_device_name()
    return row["suite"] == part and not (part == "step" and row.get("driver"))


def renewed(baseline: list[Row], rows: list[Row]) -> list[Row]:
    """The baseline with `rows` in place of all that it holds of their suites and devices."""
    replaced = {(row["suite"], device(row)) for row in rows}
    return [row for row in baseline if (row["suite"], device(row)) not in replaced] + rows


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.pages.bench_check", __doc__)
    chosen = [part for part in PARTS if part not in settings.skip and (not settings.only or part in settings.only)]
    if not chosen:
        raise UserError("--only and --skip leave no part to run")
    if settings.write and not settings.baseline.exists():
        baseline: list[Row] = []
    else:
        baseline = read(settings.baseline)
    rows: list[Row] = []
    notes: list[str] = []
    complaints: list[str] = []
    for part in chosen:
        print(f"{part} ...", file=sys.stderr, flush=True)
        try:
            found = PARTS[part](settings, baseline)
        except UserError as error:
            found = Found(complaints=[f"{part}: {error}"])
        rows += found.rows
        notes += found.notes
        complaints += found.complaints
    if settings.out is not None:
        write_atomic(settings.out, _lines(rows))
    lines = compare([row for row in baseline if any(belongs(row, part) for part in chosen)], rows, settings.tolerance)
    print("\n".join([table(lines), *notes, *complaints]))
    if settings.write and not complaints:
        write_atomic(settings.baseline, _lines(renewed(baseline, rows)))
        print(f"{settings.baseline}: renewed")
        return
    worse = failed(lines) or failed([line for line in lines if line.row["suite"] in EXACT], strict=True)
    if worse or complaints:
        raise SystemExit(1)


def _lines(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
