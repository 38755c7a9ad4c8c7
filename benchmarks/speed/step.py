"""The lower and the upper step: ours against the same steps through diffusers, and the ladder from there to here.

    python -m benchmarks.speed.step --device cpu               the mini world's UNets, against `released` and `eager`
    python -m benchmarks.speed.step --device cuda --ladder     Stable Diffusion 2.1 at 512 px, every technique by itself
    python -m benchmarks.speed.step --device cpu --check       fails if ours is slower than `released`

`benchmarks.speed.peers` says what the peers are. All have the same weights, batches, noise and timesteps and hold the
same
pruned student; a peer whose first losses are not ours is not timed. Each is timed in turns with ours in one run: the
ratio is the median over rounds. Rows are written as they come.

    ms, images_per_second     of a step of --batch images
    mfu                       matrix products that the step needs over its time, as a share of the rate that this
                              machine reaches: lower, the teacher once and the student three times; upper, the teacher
                              twice and the student six times, three without the penalty, as in `released`
    peak_gib                  memory that the provider adds at its peak, on a GPU
    launches                  ops that the host dispatches in a step; the replay of a graph is none of them
    host_syncs                times that a step waits for the GPU
"""

import gc
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import cards
from benchmarks.machine import describe
from benchmarks.measure import Timing, interleaved
from benchmarks.rows import append_rows
from benchmarks.speed import peers
from benchmarks.speed.ours import Rung, beside, ladder, ours, warm_up
from benchmarks.speed.peers import Inputs, Peer
from benchmarks.structures import Model, model, structure
from bilevel_fast.base import errors, flags
from bilevel_fast.base.devices import settle_libraries
from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import LEVEL_STRIDE, Batch
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, normal
from bilevel_fast.profiling.cost import Counter

SAME = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # relative difference of losses that is rounding
LEVELS = ("lower", "upper")
RELEASED = {
    "as released": {},
    "no anomaly mode": {"anomaly": False},
    "cached latents": {"anomaly": False, "vae": None},
}  # each with what is above it

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run. On the CPU it is always the mini world's UNets, in fp32, and `released` encodes no pixels."""
    tiny: bool = False
    """The mini world's UNets on a GPU as well: a rehearsal."""
    structure: str = "0.80"
    """The student: dense, 0.80 or 0.55 of the MACs, or planned-0.80 or planned-0.55; `benchmarks/structures.py`."""
    batch: int = 16
    """Images per step."""
    rounds: int = 20
    """Rounds that count."""
    peers: tuple[Literal["released", "eager", "compile"], ...] = ("released", "eager")
    """Whom to compare with; compile takes minutes before its first step."""
    ladder: bool = False
    """Also time every rung between `released` and ours, and the options beside."""
    out: Path | None = None
    """Append rows to this file as they come."""
    json: bool = False
    """One JSON object per row instead of text."""
    check: bool = False
    """Exit with 1 if ours is slower than `released`."""


def make_inputs(size: Model, kept: Structure, batch: int) -> Inputs:
    """Random weights; student and teacher agree where the student has weights."""
    torch.manual_seed(0)
    dense = UNet(size.config)
    shape = (size.config.in_channels, size.latent, size.latent)

    def draw(level: int) -> Batch:
        index = torch.arange(batch) + level * LEVEL_STRIDE
        text, anchor = (
            normal(number, Stream.CAPTION, index, (size.text, size.config.cross_attention_dim)) for number in (0, 1)
        )
        return Batch(normal(0, Stream.WORLD, index, shape), text, anchor, index)

    student = dense.cut(kept)
    return Inputs(kept, dense.state_dict(), student.state_dict(), draw(0), draw(1))


def products(size: Model, kept: Structure, batch: int, case: str, provider: str) -> float:
    """FLOPs of the matrix products that a step needs."""
    teacher, student = (2 * count(s, size.latent, size.text).true * batch for s in (Structure.dense(size.config), kept))
    if case == "lower":
        return teacher + 3 * student
    return 2 * teacher + (3 if provider == "released" else 6) * student


@dataclass(frozen=True)
class Contender:
    """Somebody's steps, named as in the rows, and how far its losses may be from ours."""

    provider: str
    rung: str
    build: Callable[[], Peer]
    same: float
    rung_settings: Rung | None = None

    @property
    def name(self) -> str:
        """Of the ratio's metric."""
        whole = {"as released": "released", self.provider: self.provider}
        return whole.get(self.rung, f"{self.provider}_{self.rung}").replace(" ", "_")


def contenders(settings: Settings, inputs: Inputs, device: torch.device) -> Iterator[Contender]:
    """Everybody but the top of our ladder."""
    low = torch.float32 if device.type == "cpu" else torch.bfloat16
    vae = None if device.type == "cpu" else peers.TINY_VAE if settings.tiny else peers.SD_VAE
    rungs = ladder(device)
    tolerance = {rung.name: SAME[low] for rung in (*rungs, *beside(device))}
    if "released" in settings.peers:
        for name, changes in RELEASED.items():
            if name == "as released" or (settings.ladder and not (vae is None and "vae" in changes)):
                build = partial(peers.released, inputs, device, **{"vae": vae, **changes})
                yield Contender("released", name, build, SAME[low])
    if "eager" in settings.peers:
        yield Contender("eager", "eager", partial(peers.eager, inputs, device, dtype=low), SAME[low])
    if "compile" in settings.peers:
        yield Contender("compile", "compile", partial(peers.compiled, inputs, device, dtype=low), SAME[low])
    if settings.ladder:
        for rung in (*rungs[:-1], *beside(device)):
            yield Contender("ours", rung.name, partial(ours, inputs, device, rung), tolerance[rung.name], rung)


def measure(settings: Settings) -> Iterator[Row]:
    """Rows, as they are measured. Whoever fails leaves a row without a value that says why.

    Raises:
        UserError: There is no such device or structure, or that structure is no cut of the teacher.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU")
    device = torch.device(settings.device)
    settle_libraries(device)
    size = model(tiny=settings.tiny or device.type == "cpu")
    kept = structure(settings.structure, tiny=size.name == "mini")
    if kept.config != size.config:
        raise UserError(
            f"--structure {settings.structure} is a UNet of its own, wanted one that is cut from the teacher"
        )
    inputs = make_inputs(size, kept, settings.batch)
    rate = cards.this_machine(device).matmul
    config = {"unet": size.name, "structure": settings.structure, "batch": settings.batch, "latent": size.latent}
    machine = describe(device)

    def row(
        case: str, provider: str, rung: str, metric: str, timing: Timing | float | None, unit: str, **more: Any
    ) -> Row:
        value = timing.p50 if isinstance(timing, Timing) else timing
        spread = {"p20": timing.p20, "p80": timing.p80} if isinstance(timing, Timing) else {"p20": None, "p80": None}
        return {
            "suite": "step", "case": case, "provider": provider, "metric": metric, "value": value, "unit": unit,
            **spread, "config": {**config, "rung": rung}, **machine, **more,
        }  # fmt: skip

    def speed(provider: str, rung: str, case: str, timing: Timing) -> Iterator[Row]:
        needed = products(size, kept, settings.batch, case, provider)
        yield row(case, provider, rung, "ms", timing.map(lambda s: s * 1e3), "ms")
        yield row(case, provider, rung, "images_per_second", timing.map(lambda s: settings.batch / s), "img/s")
        yield row(case, provider, rung, "mfu", timing.map(lambda s: needed / s / rate), "of measured matmul rate")

    def once(provider: str, rung: str, peer: Peer, before: int) -> Iterator[Row]:
        for case, call in zip(LEVELS, (peer.lower, peer.upper), strict=True):
            with Counter() as counter:
                call()
            yield row(case, provider, rung, "launches", counter.launches, "ops")
            if device.type == "cuda":
                yield row(case, provider, rung, "host_syncs", host_syncs(call), "waits")
                peak = (torch.cuda.max_memory_allocated(device) - before) / 2**30
                yield row(case, provider, rung, "peak_gib", peak, "GiB")

    top, before = ladder(device)[-1], _allocated(device)
    best = ours(inputs, device, top)
    losses = warm_up(best, top)
    yield from once("ours", top.name, best, before)
    timed = False
    for other in contenders(settings, inputs, device):
        try:
            before = _allocated(device)
            peer = other.build()
            check(other, warm_up(peer, other.rung_settings), losses)
            yield from once(other.provider, other.rung, peer, before)
            for case in LEVELS:
                calls = {"ours": getattr(best, case), "theirs": getattr(peer, case)}
                found = interleaved(calls, settings.rounds, synchronize=_synchronize(device))
                if not timed:
                    yield from speed("ours", top.name, case, found["ours"])
                yield from speed(other.provider, other.rung, case, found["theirs"])
                ratio = found["ours"].times_faster_than(found["theirs"])
                yield row(case, "ours", top.name, f"times_faster_than_{other.name}", ratio, "x", against=other.rung)
            timed = True
        except (RuntimeError, UserError, ImportError) as error:  # one that fails takes nobody along
            reason = str(error).strip().splitlines()[0]
            yield row("lower", other.provider, other.rung, "ms", None, "ms", reason=reason)
        peer = calls = None  # what times it holds it as well, and the next may need its memory
        gc.collect()
        _empty(device)


def check(other: Contender, found: tuple[float, float], wanted: tuple[float, float]) -> None:
    """No time of something that computes something else is worth measuring."""
    for case, mine, theirs in zip(LEVELS, wanted, found, strict=True):
        if not math.isclose(mine, theirs, rel_tol=other.same):
            raise UserError(f"{other.rung}: its first {case} loss is {theirs:.6g}, ours {mine:.6g}; it is not timed")


def host_syncs(call: Callable[[], object]) -> int:
    """How often a call waits for the GPU, by torch's own count."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def _allocated(device: torch.device) -> int:
    """Bytes in use; from here on a new peak is looked for."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _empty(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def text(row: Row) -> str:
    name = f"{row['case']} {row['provider']} ({row['config']['rung']}) {row['metric']}"
    if row["value"] is None:
        return f"{name:<64} not measured: {row['reason']}"
    spread = f" ({row['p20']:.3f} .. {row['p80']:.3f})" if row["p20"] is not None else ""
    return f"{name:<64}{row['value']:>12.3f} {row['unit']}{spread}"


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.speed.step", __doc__)
    slower = []
    for row in measure(settings):
        print(json.dumps(row) if settings.json else text(row), flush=True)
        if settings.out is not None:
            append_rows(settings.out, [row])
        if row["case"] == "lower" and row["metric"] == "times_faster_than_released" and row["value"] < 1.0:
            slower.append(f"{row['value']:.3f}x")
    if settings.check and slower:
        raise SystemExit(f"ours is slower than `released`: {slower[0]}")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
