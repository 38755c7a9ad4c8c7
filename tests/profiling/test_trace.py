"""Where the time of a step goes, read from traces that are written by hand."""

from bilevel_fast.profiling.trace import OTHER, OUTSIDE, Recorded, Span, digest, innermost


def event(cat: str, name: str, start: float, end: float, tid: int = 1, **args) -> dict:
    """A range of a Chrome trace; times in us, as there."""
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid, "args": args}


numbers = iter(range(10**6))


def kernel(name: str, start: float, end: float, launched: float | None, tid: int = 1) -> list[dict]:
    """A kernel and, unless the profiler lost it, its launch."""
    correlation = next(numbers)
    launch = (
        []
        if launched is None
        else [event("cuda_runtime", "launch", launched, launched + 1, tid, correlation=correlation)]
    )
    return [*launch, event("kernel", name, start, end, tid=7, correlation=correlation)]


def by_room(record: Recorded) -> dict[str, int]:
    sums: dict[str, int] = {}
    for work in record.work:
        sums[work.room] = sums.get(work.room, 0) + work.end - work.start
    return sums


def test_the_innermost_span_counts():
    spans = [Span(0, 100, "a"), Span(10, 50, "b"), Span(20, 30, "c"), Span(50, 60, "b"), Span(60, 60, "empty")]
    pieces = innermost(spans)
    assert pieces == [
        (0, 10, "a"), (10, 20, "b"), (20, 30, "c"), (30, 50, "b"), (50, 60, "b"), (60, 100, "a"),
    ]  # fmt: skip


def test_pieces_never_overlap_even_if_a_trace_is_a_nanosecond_off():
    pieces = innermost([Span(0, 100, "a"), Span(40, 101, "b"), Span(200, 210, "c")])
    assert pieces == [(0, 40, "a"), (40, 100, "b"), (200, 210, "c")]


def test_rooms_and_ops_on_the_cpu():
    events = [
        event("user_annotation", "step/lower", 0, 100),
        event("user_annotation", "room/student", 10, 60),
        event("user_annotation", "room/losses", 40, 60),
        event("user_annotation", "room/teacher", 0, 90, tid=2),  # not the thread of the step
        event("cpu_op", "linear", 10, 40),
        event("cpu_op", "addmm", 15, 35),
        event("cpu_op", "addmm", 45, 50),
        event("cpu_op", "addmm", 70, 75),
        event("cpu_op", "addmm", 200, 300),  # in no step
    ]
    (record,) = digest(events, cuda=False)["lower"]
    assert by_room(record) == {OTHER: 50_000, "student": 30_000, "losses": 20_000}
    ops: dict[tuple[str, str], list[int]] = {}
    for op, where, ns, calls in record.ops:
        ops.setdefault((op, where), [0, 0])
        ops[op, where][0] += ns
        ops[op, where][1] += calls
    assert ops["addmm", "student"] == [20_000, 1]
    assert ops["linear", "student"] == [10_000, 1]
    assert ops["addmm", "losses"] == [5_000, 1]
    assert ops["addmm", OTHER] == [5_000, 1]
    assert {where: ops[OUTSIDE, where] for where in (OTHER, "losses")} == {
        OTHER: [45_000, 0], "losses": [15_000, 0],
    }  # fmt: skip
    assert (OUTSIDE, "student") not in ops
    assert sum(ns for ns, _ in ops.values()) == 100_000


def test_kernels_belong_to_the_room_of_their_launch():
    """Launched by the step's thread, by autograd's, by the loader's, outside of rooms, and nobody knows where."""
    backward_op = "autograd::engine::evaluate_function: MmBackward0"
    events = [
        event("user_annotation", "step/lower", 0, 100),
        event("user_annotation", "room/teacher", 0, 20),
        event("user_annotation", "room/backward", 40, 80),
        # torch's echo of ranges on the device: on stream 3, which is no thread
        event("gpu_user_annotation", "step/lower", 0, 1000, tid=3),
        event("gpu_user_annotation", "room/optimizer", 0, 1000, tid=3),
        event("cpu_op", backward_op, 45, 60, tid=3),
        *kernel("gemm", 100, 130, launched=5),
        *kernel("gemm", 130, 140, launched=50, tid=3),
        *kernel("copy", 135, 155, launched=50, tid=4),
        *kernel("add", 160, 163, launched=30),
        *kernel("lost", 90, 91, launched=None),
        *kernel("late", 500, 600, launched=99),  # runs when the host is far ahead
        *kernel("stray", 700, 800, launched=150),  # in no step
        event("user_annotation", "step/lower", 200, 300),
    ]
    first, second = digest(events, cuda=True)["lower"]
    assert by_room(first) == {"teacher": 30_000, "backward": 10_000, "data": 20_000, OTHER: 104_000}
    assert first.launches == {"teacher": 1, "backward": 1, "data": 1, OTHER: 3}
    assert ("gemm", "backward", 10_000, 1) in first.ops
    assert second.work == []


def test_an_autograd_thread_that_enters_a_room_is_in_that_room():
    """Recomputed forward passes: autograd's thread runs the model, and says so."""
    events = [
        event("user_annotation", "step/lower", 0, 100),
        event("user_annotation", "room/backward", 0, 100),
        event("user_annotation", "room/student", 20, 40, tid=3),
        event("cpu_op", "autograd::engine::evaluate_function: X", 10, 60, tid=3),
        *kernel("again", 100, 105, launched=30, tid=3),
        *kernel("grad", 105, 112, launched=50, tid=3),
    ]
    (record,) = digest(events, cuda=True)["lower"]
    assert by_room(record) == {"student": 5_000, "backward": 7_000}
