"""Latency of one UNet evaluation, dense against pruned: does a pruned UNet get as much faster as its MACs promise?

    python -m benchmarks.speed.unet --device cuda --providers eager torch graphs ours --out rows.jsonl
    python -m benchmarks.speed.unet --device cuda --providers torch compile ours --structures dense 0.80 --batch 16
    python -m benchmarks.speed.unet --device cuda --sites  every distinct ResNet and Transformer alone, at some widths
    python -m benchmarks.speed.unet --tiny     a rehearsal on the CPU, with the mini world's UNet
    python -m benchmarks.speed.unet --device cuda --check  fails if a speedup fell by over 3 % against committed rows

    eager     diffusers' UNet2DConditionModel, channels_last; a pruned one is cut as the authors cut theirs
    torch     our UNet on torch's ops
    compile   the same through torch.compile, one graph; compiled anew, which takes its time, for each UNet and batch
    graphs    the same as a CUDA graph
    ours      our UNet on the implementations that won on this hardware (`ops.providers`); a CUDA graph on CUDA

bf16 on CUDA, fp32 on the CPU; random weights, the same ones for all providers. Everything of one batch size is timed in
one interleaved run, from the call until the device is idle, as a sampler waits for it; no cache of a card holds the
weights of SD 2.1, so nothing is flushed in between. A provider is not timed if its output is further from torch's than
twice what rounding to this dtype changes in torch's own. What cannot run is a row without a value that says why.

`realised_speedup` is (dense ms / pruned ms) / (dense MACs / pruned MACs), `true` MACs, for one provider and batch,
the median over the rounds: 1 if all MACs that were pruned were worth their time.
"""

import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.machine import describe
from benchmarks.measure import Timing, Unavailable, interleaved
from benchmarks.rows import append_rows
from benchmarks.speed.unet_providers import PROVIDERS, Inputs, bound, distance, plain
from benchmarks.speed.unet_sites import site_rows
from benchmarks.structures import NAMES, PLANNED, Model, model, structure
from bilevel_fast.base import errors, flags
from bilevel_fast.base.devices import settle_libraries
from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.models.macs import count
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.providers import TABLE, architecture
from bilevel_fast.ops.randomness import Stream, integers, normal

SLACK = 0.03  # by which a realised speedup may fall short of the committed one
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    tiny: bool = False
    """The mini world's UNet instead of SD 2.1's."""
    batch: tuple[int, ...] = (1, 2, 16)
    """Images."""
    structures: tuple[str, ...] = NAMES
    """Which UNets; `benchmarks/structures.py` says what they are. planned-0.80 and planned-0.55 are there, too."""
    providers: tuple[str, ...] = tuple(PROVIDERS)
    """Which ways to run them."""
    align: int | None = None
    """Pad the inner widths of ResNets to a multiple of this; 8 on CUDA and 1 on the CPU if not given."""
    rounds: int = 20
    """Rounds that count."""
    out: Path | None = None
    """Append rows to this file as they come: after each batch size, or site."""
    sites: bool = False
    """Time every distinct site of the dense UNet alone instead, at several kept widths."""
    check: bool = False
    """Exit with 1 if `ours` realises less than the rows of this machine in `benchmarks/results` say."""
    json: bool = False
    """One JSON object per row instead of text."""


@dataclass
class Subject:
    """A UNet under a provider: how to call it, or why that is not possible."""

    name: str
    unet: UNet
    provider: str
    call: Callable[[], Tensor] | None = None
    reason: str | None = None
    timing: Timing | None = None
    facts: Row = field(default_factory=dict)

    def fail(self, error: BaseException) -> None:
        self.call, self.timing = None, None
        kind = "" if isinstance(error, Unavailable | UserError) else f"{type(error).__name__}: "
        self.reason = kind + " ".join(str(error).split())[:200]


def make_inputs(size: Model, batch: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    index, config = torch.arange(batch), size.config
    x = normal(0, Stream.WORLD, index, (config.in_channels, size.latent, size.latent)).to(device, dtype)
    t = integers(0, Stream.TIMESTEP, index, 1000).to(device)
    text = normal(0, Stream.CAPTION, index, (size.text, config.cross_attention_dim)).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last), t, text


def prepare(subject: Subject, inputs: Inputs, limit: float) -> None:
    """Make the call of a subject and compare what it computes; whatever goes wrong is this subject's `reason`."""
    try:
        expected = plain(subject.unet, inputs, "torch")()
        start = time.perf_counter()
        subject.call = PROVIDERS[subject.provider](subject.unet, inputs)
        error = distance(subject.call(), expected)
        if not error <= limit:
            raise Unavailable(f"computes something else: {error:.2g} away from torch, at most {limit:.2g} is rounding")
        subject.facts |= {"error": error, "bound": limit, "prepare_s": time.perf_counter() - start}
    except Exception as error:  # one that fails must not stop the others
        subject.fail(error)


class Broke(Exception):
    """A subject that ran before has failed."""


def time_all(subjects: Sequence[Subject], rounds: int, device: torch.device) -> None:
    """Time all that can be called, interleaved; one that fails on the way is left out and the others start again."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)

    def guarded(subject: Subject, call: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            try:
                call()
            except Exception as error:
                subject.fail(error)
                raise Broke from error

        return run

    while calls := {str(i): guarded(s, s.call) for i, s in enumerate(subjects) if s.call is not None}:
        try:
            timings = interleaved(calls, rounds, synchronize=synchronize)
        except Broke:
            continue
        for i, timing in timings.items():
            subjects[int(i)].timing = timing
        return


def rows_of(subjects: Sequence[Subject], size: Model, batch: int) -> Iterator[Row]:
    """`ms` of each subject, and `realised_speedup` of each but the dense ones, where those are there."""
    dense = {s.provider: s for s in subjects if s.name == "dense"}
    for s in subjects:
        macs = count(s.unet.structure, size.latent, size.text)
        config = {
            "model": size.name,
            "structure": s.name,
            "batch": batch,
            "latent": size.latent,
            "text": size.text,
            "gmacs": macs.true / 1e9,
            "params": macs.params,
            **s.facts,
        }
        shared = {"suite": "unet", "case": f"{size.name} {s.name} b{batch}", "provider": s.provider, "config": config}
        yield shared | _value("ms", "ms", s.timing, 1e3, s.reason)
        base = dense.get(s.provider)
        if s.name == "dense" or base is None:
            continue
        ratio = macs.true / count(base.unet.structure, size.latent, size.text).true
        speedup = s.timing.times_faster_than(base.timing) if s.timing and base.timing else None
        reason = s.reason or f"dense: {base.reason}"
        yield shared | _value("realised_speedup", "x", speedup, ratio, reason)


def _value(metric: str, unit: str, timing: Timing | None, factor: float, reason: str | None) -> Row:
    row: Row = {"metric": metric, "unit": unit}
    if timing is None:
        return row | {"value": None, "reason": reason}
    return row | {"value": timing.p50 * factor, "p20": timing.p20 * factor, "p80": timing.p80 * factor}


def measure(settings: Settings) -> Iterator[list[Row]]:
    """All rows of one batch size after the other; with `sites`, of one site."""
    device, size = torch.device(settings.device), model(settings.tiny)
    settle_libraries(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    align = settings.align or (8 if device.type == "cuda" else 1)
    machine = describe(device) | {"dtype": str(dtype).removeprefix("torch.")}
    if settings.sites:
        like = torch.empty(0, dtype=dtype, device=device)
        for batch in settings.batch:
            for rows in site_rows(size, batch, settings.rounds, align, like):
                yield [row | machine for row in rows]
        return
    unets: dict[str, tuple[UNet, float]] = {}
    for name in settings.structures:
        kept = structure(name, settings.tiny)
        torch.manual_seed(0)
        with device:
            unet = UNet(kept.config, kept, align).to(dtype).eval().requires_grad_(False)
        unets[name] = unet, bound(unet, make_inputs(size, 1, device, dtype))
    for batch in settings.batch:
        inputs = make_inputs(size, batch, device, dtype)
        subjects: list[Subject] = []
        for name, (unet, limit) in unets.items():
            for provider in settings.providers:
                facts: Row = {"align": align}
                if provider == "ours":
                    facts["ops"] = TABLE.get(architecture(device), {})
                subjects.append(Subject(name, unet, provider, facts=facts))
                prepare(subjects[-1], inputs, limit)
        time_all(subjects, settings.rounds, device)
        load = {"load": os.getloadavg()[0]}  # processes that ran, those of others included: what a CPU's ms are worth
        yield [row | machine | load for row in rows_of(subjects, size, batch)]
        subjects.clear()
        gc.collect()
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


# --- the committed rows ---


def committed(machine: str) -> list[Row]:
    """The rows of this benchmark in `benchmarks/results` that were measured on `machine`; of equals, the last counts.

    Raises:
        UserError: There are none.
    """
    lines = [line for path in sorted(RESULTS.glob("*.jsonl")) for line in path.read_text().splitlines() if line.strip()]
    rows = [row for row in map(json.loads, lines) if (row.get("suite"), row.get("device")) == ("unet", machine)]
    if not rows:
        raise UserError(f"--check: benchmarks/results has no rows of this machine ({machine})")
    return rows


def regressions(rows: Sequence[Row], baseline: Sequence[Row]) -> list[str]:
    """What `ours` realises by more than `SLACK` less than in the baseline, or not any more, one line each.

    Raises:
        UserError: They have no realised speedup of `ours` in common.
    """

    def speedups(rows: Sequence[Row]) -> dict[str, float | None]:
        wanted = ("ours", "realised_speedup")
        return {row["case"]: row["value"] for row in rows if (row["provider"], row["metric"]) == wanted}

    now, then = speedups(rows), {case: value for case, value in speedups(baseline).items() if value is not None}
    common = [case for case in now if case in then]
    if not common:
        raise UserError("--check: nothing measured that the committed rows have as well")
    found = []
    for case in common:
        value, was = now[case], then[case]
        if value is None or value < was * (1 - SLACK):
            is_now = "not measured" if value is None else f"{value:.3f}"
            found.append(f"{case}: realised speedup {is_now}, was {was:.3f}")
    return found


# --- command line ---


def text(row: Row) -> str:
    start = f"{row['case']:<{40 if row['suite'] == 'unet_sites' else 24}}{row['provider']:<8}{row['metric']:<17}"
    if row["value"] is None:
        return f"{start} not measured: {row['reason']}"
    return f"{start}{row['value']:>10.3f} {row['unit']:<3}({row['p20']:.3f} .. {row['p80']:.3f})"


def validate(settings: Settings) -> None:
    """Raise UserError for what cannot be measured."""
    for flag, names, known in (
        ("--structures", settings.structures, (*NAMES, *PLANNED)),
        ("--providers", settings.providers, tuple(PROVIDERS)),
    ):
        for name in names:
            if name not in known:
                raise UserError(f"{flag} {name}: there is none of that name{nearest(name, known)}")
        if not names or len(set(names)) < len(names):
            raise UserError(f"{flag}: wanted at least one name, and each of them once")
    if not settings.batch or any(b < 1 for b in settings.batch):
        raise UserError(f"--batch {' '.join(map(str, settings.batch))}: wanted positive numbers of images")
    if settings.rounds < 4:
        raise UserError(f"--rounds {settings.rounds}: wanted at least 4")
    if settings.align is not None and settings.align < 1:
        raise UserError(f"--align {settings.align}: wanted at least 1")
    if settings.check and settings.sites:
        raise UserError("--check compares whole UNets, it cannot go with --sites")
    if settings.check and not {"dense", "ours"} <= {*settings.structures, *settings.providers}:
        raise UserError("--check needs the structure dense and the provider ours")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU")


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.speed.unet", __doc__)
    validate(settings)
    baseline = committed(describe(torch.device(settings.device))["device"]) if settings.check else []
    rows: list[Row] = []
    for found in measure(settings):
        rows += found
        for row in found:
            print(json.dumps(row) if settings.json else text(row), flush=True)
        if settings.out is not None:
            append_rows(settings.out, found)
    if settings.check and (worse := regressions(rows, baseline)):
        raise SystemExit("\n".join(worse))


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
