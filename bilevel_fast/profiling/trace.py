"""Reads a Chrome trace of torch.profiler: which room of which step the time went to.

    CPU     wall time. Rooms nest, the innermost counts; what lies in no room is `other`. The pieces fill the step.
    CUDA    kernels, copies and fills on the device. Each belongs to the room that its launch lies in. Autograd launches
            from threads of its own: there, it is the room that the step's thread is in at that moment. Any other thread
            is the loader's, and in `data`.

A step is a range `step/NAME`, a room a range `room/NAME`. Times are whole nanoseconds, so that sums are exact.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

OTHER = "other"
OUTSIDE = "(outside of any op)"
STEP, ROOM = "step/", "room/"
_AUTOGRAD = "autograd::engine::"
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


class Span(NamedTuple):
    """Something that has a name from `start` to `end`, in ns."""

    start: int
    end: int
    name: str

    @property
    def ns(self) -> int:
        return self.end - self.start


class Work(NamedTuple):
    """A span of time that belongs to a room: on the CPU a stay in it, on CUDA a kernel that was launched from it."""

    start: int
    end: int
    room: str


@dataclass(frozen=True)
class Recorded:
    """One step, as the trace has it. `ops` are (op, room, ns, calls)."""

    work: list[Work]
    ops: list[tuple[str, str, int, int]]
    launches: dict[str, int]
    wall_ns: int


def digest(events: Iterable[Mapping[str, Any]], cuda: bool) -> dict[str, list[Recorded]]:
    """Read the `traceEvents` of a Chrome trace: the steps of each kind, in order."""
    ranges: dict[Any, list[Span]] = defaultdict(list)
    ops: dict[Any, list[Span]] = defaultdict(list)
    launched: dict[int | None, tuple[Any, int]] = {}
    kernels: list[tuple[Span, int | None]] = []
    steps: list[tuple[Span, Any]] = []
    for event in events:
        kind = event.get("cat")
        if event.get("ph") != "X":
            continue
        start = round(event["ts"] * 1000)
        span, thread = Span(start, start + round(event.get("dur", 0) * 1000), event["name"]), event.get("tid")
        if kind == "user_annotation" and span.name.startswith(STEP):
            steps.append((span._replace(name=span.name.removeprefix(STEP)), thread))
        elif kind == "user_annotation" and span.name.startswith(ROOM):
            ranges[thread].append(span._replace(name=span.name.removeprefix(ROOM)))
        elif kind == "cpu_op":
            ops[thread].append(span)
        elif kind in _LAUNCHES:
            launched[event["args"].get("correlation")] = (thread, start)
        elif kind in _ON_DEVICE:
            kernels.append((span, event["args"].get("correlation")))

    found: dict[str, list[Recorded]] = defaultdict(list)
    own = {thread: innermost(spans) for thread, spans in ranges.items()}
    autograd = {thread for thread, spans in ops.items() if any(span.name.startswith(_AUTOGRAD) for span in spans)}
    steps.sort()
    by_step: list[list[tuple[Span, str]]] = [[] for _ in steps]
    starts = [span.start for span, _ in steps]
    for kernel, correlation in sorted(kernels):
        # a launch that the profiler has lost: the kernel is placed by when it ran, and in no room
        thread, moment = launched.get(correlation, (None, kernel.start))
        index = bisect_right(starts, moment) - 1
        if index < 0 or moment >= steps[index][0].end:
            continue
        main = steps[index][1]
        room = _at(own.get(thread, []), moment)
        if room is None and thread in autograd:
            room = _at(own.get(main, []), moment)
        elif room is None and thread not in (main, None):
            room = "data"
        by_step[index].append((kernel, room or OTHER))
    for (step, thread), on_device in zip(steps, by_step, strict=True):
        record = _on_cuda(step, on_device) if cuda else _on_cpu(step, ranges[thread], ops[thread])
        found[step.name].append(record)
    return dict(found)


def _on_cuda(step: Span, kernels: list[tuple[Span, str]]) -> Recorded:
    launches: dict[str, int] = defaultdict(int)
    for _, room in kernels:
        launches[room] += 1
    work = [Work(kernel.start, kernel.end, room) for kernel, room in kernels]
    return Recorded(work, [(kernel.name, room, kernel.ns, 1) for kernel, room in kernels], dict(launches), step.ns)


def _on_cpu(step: Span, ranges: list[Span], ops: list[Span]) -> Recorded:
    def within(spans: list[Span]) -> list[Span]:
        return [span for span in spans if step.start <= span.start < step.end]

    stays = innermost([step._replace(name=OTHER), *within(ranges)])
    selves = [
        (piece.name, _at(stays, piece.start) or OTHER, piece.ns, 0)
        # rooms are in it as well, so that what is outside of any op ends where a room does
        for piece in innermost([span._replace(name=OUTSIDE) for span in (step, *within(ranges))] + within(ops))
    ]
    calls = [(op.name, _at(stays, op.start) or OTHER, 0, 1) for op in within(ops)]
    return Recorded([Work(*stay) for stay in stays], selves + calls, {}, step.ns)


def innermost(spans: Sequence[Span]) -> list[Span]:
    """Cut nested spans of one thread into pieces that do not overlap, each named as the innermost span around it."""
    pieces: list[Span] = []
    open_: list[Span] = []
    now = 0

    def until(moment: int) -> None:
        nonlocal now
        if moment > now and open_:
            pieces.append(Span(now, moment, open_[-1].name))
        now = max(now, moment)

    # of spans that start together the longer is outside; of equal ones, the one that comes first
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while open_ and open_[-1].end <= span.start:
            until(open_[-1].end)
            open_.pop()
        until(span.start)
        # a trace rounds to a nanosecond or so: what is inside must not end later
        open_.append(span._replace(end=min(span.end, open_[-1].end)) if open_ else span)
    while open_:
        until(open_[-1].end)
        open_.pop()
    return pieces


def _at(pieces: Sequence[Span], moment: int) -> str | None:
    """Name of the piece at a moment; pieces in order."""
    index = bisect_right(pieces, moment, key=lambda piece: piece.start) - 1
    return pieces[index].name if index >= 0 and moment < pieces[index].end else None
