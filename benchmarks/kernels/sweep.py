"""Every op against its rivals: microseconds, rate and share of the roofline.

    python -m benchmarks.kernels.sweep --device cuda --out rows.jsonl    all ops; rows are appended as they are measured
    python -m benchmarks.kernels.sweep --op geglu                        one op, printed
    python -m benchmarks.kernels.sweep --tune --out rows.jsonl           rank those rows in ops/providers.json

The rivals of a case are timed in one interleaved run: on a GPU with a cold L2 cache, and from a CUDA graph where the
call can be captured, so that launch costs do not hide what the kernels do. The roofline is the larger of bytes over
measured copy rate and FLOPs over measured matmul rate. A rival that cannot run is a row without a value that says why.
On a GPU the shapes are those of SD 2.1 at 512 px; on the CPU those of the mini world, for the native ops.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.kernels.cases import TUNED, Case
from benchmarks.kernels.tuning import PATH, tune
from benchmarks.machine import describe
from benchmarks.measure import Timing, Unavailable, interleaved, interleaved_cuda, recorded
from benchmarks.rows import append_rows
from bilevel_fast.base import errors, flags
from bilevel_fast.base.devices import settle_libraries
from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.files import mend
from bilevel_fast.ops.providers import architecture

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    op: str | None = None
    """Only this one."""
    batch: tuple[int, ...] = (16, 2)
    """Images; all ops at the first batch before any at the next."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of activations; bfloat16 on a GPU and float32 on the CPU if not given."""
    rounds: int = 20
    """Rounds that count."""
    out: Path | None = None
    """Append rows to this file as they are measured; what it holds already is not measured again."""
    compile: bool = False
    """Also time what torch.compile makes of the reference: some seconds of compiling a case."""
    tune: bool = False
    """Measure nothing; rank the rows of `out` in the table that `bilevel_fast.ops.providers` reads."""
    table: Path = PATH
    """The table to rank them in."""
    json: bool = False
    """One JSON object per row instead of text."""


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measured bytes per second of a copy and FLOPs per second of a matrix product."""
    cuda = device.type == "cuda"
    source = torch.randn(2**29 if cuda else 2**24, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    n = 8192 if cuda else 1024
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))  # zeros take less power, and less time
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    best = {name: min(timing.seconds) for name, timing in _time(calls, 10, device).items()}
    return 2 * source.nbytes / best["copy"], 2 * n**3 / best["matmul"]


def _time(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, Timing]:
    return (interleaved_cuda if device.type == "cuda" else interleaved)(calls, rounds)


def measure(case: Case, rounds: int, device: torch.device, roof: tuple[float, float]) -> list[Row]:
    """One row per provider."""
    calls: dict[str, Callable[[], object]] = {}
    missing: dict[str, str] = {}
    graphs: dict[str, bool] = {}
    for name, make in case.providers.items():
        try:
            calls[name], graphs[name] = recorded(make, device)
        except Unavailable as error:
            missing[name] = str(error)
        except torch.OutOfMemoryError:
            missing[name] = "does not fit the memory"
        except Exception as error:  # one that fails takes nobody along; a GPU that it broke fails the others as well
            missing[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    try:
        timings = _time(calls, rounds, device) if calls else {}
    except RuntimeError as error:
        missing |= dict.fromkeys(calls, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
        timings = {}
    least = max(case.bytes / roof[0], case.flops / roof[1])
    shared = {"suite": "kernels", "op": case.op, "case": case.name, "numel": case.numel, "metric": "us", "unit": "us"}
    rows: list[Row] = [
        {**shared, "provider": name, "value": t.p50 * 1e6, "p20": t.p20 * 1e6, "p80": t.p80 * 1e6,
         "gb_per_s": case.bytes / t.p50 / 1e9, "tflop_per_s": case.flops / t.p50 / 1e12,
         "roofline": least / t.p50, "graph": graphs[name]}
        for name, t in timings.items()
    ]  # fmt: skip
    return rows + [{**shared, "provider": name, "value": None, "why": why} for name, why in missing.items()]


def all_cases(op: str, batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    module = importlib.import_module(f"benchmarks.kernels.cases.{op if device.type == 'cuda' else 'native'}")
    return [case for case in module.cases(batch, device, dtype) if case.op == op]


def text(row: Row) -> str:
    start = f"{row['op']:17} {row['case']:40} {row['provider']:16}"
    if row["value"] is None:
        return f"{start} not measured: {row['why']}"
    rate = f"{row['tflop_per_s']:6.1f} TFLOP/s" if row["tflop_per_s"] else f"{row['gb_per_s']:6.0f} GB/s   "
    spread = f"({row['p20']:.1f} .. {row['p80']:.1f})"
    return f"{start} {row['value']:10.1f} us {spread:20} {rate} {row['roofline']:4.0%} of roofline"


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.kernels.sweep", __doc__)
    if settings.op is not None and settings.op not in TUNED:
        raise UserError(f"--op {settings.op}: no such op{nearest(settings.op, TUNED)}")
    rows = [json.loads(line) for line in _lines(settings.out)]
    if settings.tune:
        if not rows:
            raise UserError(f"--tune: no rows in --out {settings.out}; measure first, with the same --out")
        tune([row for row in rows if settings.op in (None, row["op"])], settings.table)
        return
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU")
    device = torch.device(settings.device)
    dtype = getattr(torch, settings.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    done = {(row["op"], row["case"], row["dtype"], row["provider"]) for row in rows}
    settle_libraries(device)
    roof = ceilings(device, dtype)
    shared = {
        "dtype": str(dtype).removeprefix("torch."),
        "copy_gb_per_s": roof[0] / 1e9,
        "matmul_tflop_per_s": roof[1] / 1e12,
        "architecture": architecture(device),
    }
    if device.type == "cuda":
        shared["l2_bytes"] = torch.cuda.get_device_properties(device).L2_cache_size
    shared |= describe(device)
    ops = TUNED if settings.op is None else (settings.op,)
    for batch, op in product(settings.batch, ops):
        for case in all_cases(op, batch, device, dtype):
            if not settings.compile:
                case.providers.pop("compile", None)
            wanted = {(op, case.name, shared["dtype"], provider) for provider in case.providers}
            if wanted <= done:
                continue
            done |= wanted
            found = [{**row, **shared} for row in measure(case, settings.rounds, device, roof)]
            rows += found
            for row in found:
                print(json.dumps(row) if settings.json else text(row), flush=True)
            if settings.out is not None:
                append_rows(settings.out, found)
            if device.type == "cuda":
                _still_works(device)
    if not rows:
        raise UserError(f"nothing to measure: no implementation of {settings.op} but torch's runs on the {device.type}")


def _still_works(device: torch.device) -> None:
    """A kernel that reads what is not its own breaks the GPU for the whole process.

    Raises:
        UserError: It did.
    """
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError as error:
        raise UserError(f"the GPU is lost to this process; start again: {str(error).splitlines()[0]}") from error


def _lines(path: Path | None) -> list[str]:
    if path is None or not path.exists():
        return []
    mend(path)
    return path.read_text().splitlines()


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
