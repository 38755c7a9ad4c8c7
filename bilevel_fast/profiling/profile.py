"""Time, launches, FLOPs and bytes of training steps, room by room.

`measure` takes plain callables, one per kind of step, and annotates nothing itself: whatever they run inside
`phases.phase(...)` is told apart. `descents` makes those callables from the levels of a training.

Time is read from the exported trace, as `profiling.trace` says, and can be checked against the file that is kept.
FLOPs and bytes come from one further step under `cost.Counter`, without the profiler.
"""

import json
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median_low

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bilevel_fast.data.batch import Batch
from bilevel_fast.ops.graphs import WARMUP, Record
from bilevel_fast.profiling.cost import Cost, Counter
from bilevel_fast.profiling.trace import OTHER, STEP, Recorded, Work, digest
from bilevel_fast.training import phases
from bilevel_fast.training.graphs import Graphs
from bilevel_fast.training.levels import AnyLevel, descend, move
from bilevel_fast.training.upper import Terms

TOTAL = "total"


@dataclass(frozen=True)
class RoomRow:
    """A room, `other` or `total`, per step."""

    room: str
    ms: float
    share: float
    """Of the total; 1 for `total`."""
    launches: float
    """Kernels, copies and fills on CUDA; on the CPU, ops that compute or copy."""
    flops: int
    bytes: int

    @property
    def tflop_per_s(self) -> float | None:
        return self.flops / self.ms / 1e9 if self.flops and self.ms else None

    @property
    def gb_per_s(self) -> float | None:
        return self.bytes / self.ms / 1e6 if self.bytes and self.ms else None


@dataclass(frozen=True)
class OpRow:
    """An op (self time) or a kernel in a room, per step."""

    op: str
    room: str
    ms: float
    share: float
    calls: float


@dataclass(frozen=True)
class StepProfile:
    """One kind of step."""

    name: str
    repeats: int
    wall_ms: float
    """Per step, under the profiler."""
    plain_ms: float
    """Per step, without it: what the profiler costs is the difference."""
    busy_ms: float | None
    """Per step, the time in which the device did anything; None on the CPU."""
    rooms: list[RoomRow]
    ops: list[OpRow]
    timeline: list[Work]
    """The step whose wall time is the median, from 0."""


Steps = Mapping[str, Callable[[], object]]


def timed(steps: Steps, device: torch.device, repeats: Mapping[str, int], warmup: int) -> dict[str, float]:
    """Milliseconds per step of each kind, without a profiler, after `warmup` of each."""
    for _ in range(warmup):
        for step in steps.values():
            step()
    return {name: _timed(step, repeats[name], _waiter(device)) for name, step in steps.items()}


def measure(
    steps: Steps, device: torch.device, repeats: Mapping[str, int], plain: Mapping[str, float], trace: Path
) -> list[StepProfile]:
    """Profile each kind of step; they run in the order in which they are given.

    Args:
        steps: One step each; what it returns is dropped. They are warm.
        device: Where they compute.
        repeats: How many of each are recorded, at least 1.
        plain: What `timed` says of the same steps.
        trace: Where the Chrome trace is written.
    """
    cuda, wait = device.type == "cuda", _waiter(device)
    phases.annotate(True)
    try:
        with _profiler(cuda):  # the first session is slow to start, and may lose kernels
            for step in steps.values():
                step()
            wait()
        with _profiler(cuda) as profiler:
            wall = {name: _timed(_named(step, name), repeats[name], wait) for name, step in steps.items()}
    finally:
        phases.annotate(False)
    profiler.export_chrome_trace(str(trace))
    recorded = digest(json.loads(trace.read_text())["traceEvents"], cuda)

    found = []
    for name, step in steps.items():
        with Counter() as counter:
            step()
        assert len(recorded[name]) == repeats[name], "the profiler has lost a step"
        found.append(_summarize(name, recorded[name], counter.costs, plain[name], wall[name] if cuda else None))
    return found


def _waiter(device: torch.device) -> Callable[[], None]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


@contextmanager
def _profiler(cuda: bool) -> Iterator[profile]:
    if not cuda:  # Kineto would complain that there is no GPU
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda)
    with warnings.catch_warnings():
        # that it forgets the cycles before this one; keeping them would read every event twice
        warnings.filterwarnings("ignore", ".*Profiler clears events", UserWarning)
        profiler.start()
    try:
        yield profiler
    finally:
        profiler.stop()


def _timed(step: Callable[[], object], repeats: int, wait: Callable[[], None]) -> float:
    """Milliseconds per step."""
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    return (time.perf_counter() - started) / repeats * 1e3


def _named(step: Callable[[], object], name: str) -> Callable[[], None]:
    def inside() -> None:
        with record_function(STEP + name):
            step()

    return inside


def _summarize(
    name: str, records: list[Recorded], costs: Iterable[Cost], plain_ms: float, cuda_wall_ms: float | None
) -> StepProfile:
    """`costs` are those of one step; `cuda_wall_ms` is None on the CPU, where the trace tells the wall time."""
    n = len(records)
    on_cpu = cuda_wall_ms is None
    flops: dict[str, int] = defaultdict(int)
    moved: dict[str, int] = defaultdict(int)
    launches: dict[str, float] = defaultdict(float)
    for cost in costs:
        room = cost.room or OTHER
        flops[room] += cost.flops
        moved[room] += cost.bytes
        launches[room] += on_cpu
    time_ns: dict[str, int] = defaultdict(int)
    op_ns: dict[tuple[str, str], int] = defaultdict(int)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    for record in records:
        for work in record.work:
            time_ns[work.room] += work.end - work.start
        for op, room, ns, times in record.ops:
            op_ns[op, room] += ns
            calls[op, room] += times
        for room, times in record.launches.items():
            launches[room] += times / n
    total = sum(time_ns.values())

    def row(room: str, names: Sequence[str]) -> RoomRow:
        ns = sum(time_ns[name] for name in names)
        calls, work, traffic = (sum(amount[name] for name in names) for amount in (launches, flops, moved))
        return RoomRow(room, ns / n / 1e6, ns / total if total else 0.0, calls, int(work), int(traffic))

    names = (*phases.PHASES, OTHER)
    rows = [*(row(room, [room]) for room in names), row(TOTAL, names)]
    ranked = sorted(op_ns, key=lambda key: -op_ns[key])
    return StepProfile(
        name=name,
        repeats=n,
        wall_ms=total / n / 1e6 if cuda_wall_ms is None else cuda_wall_ms,
        plain_ms=plain_ms,
        busy_ms=None if on_cpu else sum(map(_busy, records)) / n / 1e6,
        rooms=rows,
        ops=[OpRow(*key, op_ns[key] / n / 1e6, op_ns[key] / total, calls[key] / n) for key in ranked if op_ns[key]],
        timeline=_timeline(records),
    )


def _busy(record: Recorded) -> int:
    """Nanoseconds in which anything ran; streams overlap."""
    busy = end = 0
    for work in sorted(record.work):
        busy += max(0, work.end - max(work.start, end))
        end = max(end, work.end)
    return busy


def _timeline(records: list[Recorded]) -> list[Work]:
    middle = median_low([record.wall_ns for record in records])
    work = sorted(next(record.work for record in records if record.wall_ns == middle))
    origin = work[0].start if work else 0
    return [Work(start - origin, end - origin, room) for start, end, room in work]


def descents(
    levels: Sequence[AnyLevel],
    device: torch.device,
    repeats: Mapping[str, int],
    warmup: int,
    record: Record | None,
    trace: Path,
) -> tuple[list[StepProfile], bool]:
    """Profile the steps of levels. They are first timed as they train; where that is as CUDA graphs, they are profiled
    without, as a graph knows no rooms; the second result says so.

    Args:
        levels: Within `loop.running`.
        device: Where they compute.
        repeats: Steps to record, by level.
        warmup: Steps of each level before anything is timed.
        record: What `graphs.Graphs` takes.
        trace: Where the Chrome trace is written.
    """
    numbers = {level.name: count() for level in levels}

    def taken(move: Callable[[AnyLevel, Batch], Terms]) -> Steps:
        return {level.name: lambda level=level: descend(level, next(numbers[level.name]), move) for level in levels}

    graphs = Graphs(record)
    plain = timed(taken(graphs), device, repeats, warmup if record is None else max(warmup, WARMUP + 1))
    recorded = graphs.record is not None  # None if a recording failed
    del graphs  # and the memory of the recorded steps
    return measure(taken(move), device, repeats, plain, trace), recorded
