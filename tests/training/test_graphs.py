"""Steps recorded and replayed: the same run to the last bit, and a clean way out where they cannot be."""

import logging
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.ops.graphs import WARMUP, Recorder, cuda_recorder, side_stream
from bilevel_fast.training.graphs import Graphs
from bilevel_fast.training.levels import bilevel, move
from bilevel_fast.training.parameters import FlatParameters
from replay import on_the_cpu
from world import B, make_batch, make_levels, make_models

STEPS, EVERY = 10, 2


@pytest.fixture(autouse=True)
def _torch_ops(monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")  # native code reads its numbers on the CPU, as no graph can


def train(run=None, steps=STEPS, change=lambda batch, step: batch, device="cpu", **settings):
    """What each step measured, the student's state, images that the teacher saw, means of all steps."""
    lower, upper = make_levels(*make_models(), device=device, **settings)
    batches = lower.batches
    lower = replace(lower, batches=lambda step: change(batches(step), step))
    walk = bilevel(lower, upper, EVERY, 0, steps, *([] if run is None else [run]))
    # a graph writes what a step measures to where it wrote it last
    terms = [{name: value.item() for name, value in step.items()} for step in walk]
    means = lower.means.take()[0] | upper.means.take()[0]
    return terms, lower.optimizer.flat.state_dict(), int(lower.gradient.answers.teacher.images), means


@cache
def plain(**settings):
    """Without recordings; not to be written to."""
    return train(**settings)


class Counting:
    """A recorder that counts."""

    def __init__(self, record=on_the_cpu):
        self.record, self.recordings, self.replays, self.alive = record, 0, 0, weakref.WeakSet()

    def __call__(self, call):
        replay, terms = self.record(call)
        self.recordings += 1

        def counted():
            self.replays += 1
            replay()

        self.alive.add(counted)
        return counted, terms


@pytest.mark.parametrize("every", [1, 20])
def test_no_step_that_could_be_recorded_runs_beside_a_recording(every):
    """A graph's pool serves nothing else: memory for a second set of activations would be wanted."""
    inside, beside = [], []

    def record(call):
        inside.append(1)
        terms = call()
        inside.pop()
        return lambda: None, terms

    def looking(level):
        def gradient(batch):
            if not inside:
                beside.append((level.name, len(counting.alive)))
            return level.gradient(batch)

        return replace(level, gradient=gradient)

    counting = Counting(record)
    graphs, (lower, upper) = Graphs(counting), map(looking, make_levels(*make_models()))
    for _ in bilevel(lower, upper, every, 0, (WARMUP + 2) * every, graphs):
        pass
    assert sorted(beside) == [("lower", 0)] * WARMUP + [("upper", 0)] * WARMUP
    assert len(counting.alive) == 2
    assert counting.recordings == (2 if every == 1 else WARMUP + 2)


@pytest.mark.parametrize(
    "settings",
    [{}, {"norm": "raw", "decay": 0.9}, {"penalty": 0.0, "dtype": torch.bfloat16}],
    ids=["grad", "raw and average", "no penalty in bf16"],
)
def test_a_replayed_run_is_the_same_run(settings):
    """Warm-up of the learning rate, Adam's step numbers, noise, the kept answer: all of it follows."""
    counting = Counting()
    expected, replayed = plain(**settings), train(Graphs(counting), **settings)
    assert counting.recordings == 4, "the lower level's three times: upper steps that warm up leave it none"
    assert counting.replays == STEPS + STEPS // EVERY - 2 * WARMUP
    assert replayed[0] == expected[0]
    for name, value in expected[1].items():
        assert torch.equal(replayed[1][name], value), name
    assert replayed[2] == expected[2] == STEPS * B + STEPS // EVERY * 2 * B
    assert replayed[3] == expected[3]
    assert replayed[0][-1]["lower/loss"] != replayed[0][-2]["lower/loss"]


def test_whoever_holds_the_parameters_hears_of_every_step(monkeypatch):
    """Of ranks, each then has weights to fetch before it computes beside the graph; a replay runs no Python."""
    heard = []
    monkeypatch.setattr(FlatParameters, "moved", lambda self: heard.append(1))
    lower, _ = make_levels(*make_models())
    graphs = Graphs(on_the_cpu)
    for step in range(WARMUP + 3):
        del heard[:]
        graphs(lower, lower.batches(step))
        assert heard
    assert graphs.record is not None


def test_a_bad_gradient_is_skipped_inside_a_graph():
    """NaN in the data of one replayed step: its gradient is not finite, and the run goes on without it."""

    def poison(batch, step):
        return batch.map(lambda x: x if x.dtype == torch.int64 else x * float("nan")) if step == 8 else batch

    expected, replayed = train(change=poison), train(Graphs(on_the_cpu), change=poison)
    assert not torch.tensor(expected[0][8]["lower/grad_norm"]).isfinite()
    assert torch.tensor(expected[0][9]["lower/loss"]).isfinite()
    torch.testing.assert_close(replayed[1], expected[1], rtol=0, atol=0)


def test_other_shapes_are_recorded_anew(caplog):
    """Both levels: the upper graph reads the teacher's answer where the lower one leaves it."""

    def shrink(batch, step):
        return batch.map(lambda x: x[: B - 1].clone()) if step >= 9 else batch

    counting = Counting()
    with caplog.at_level(logging.INFO):
        expected, replayed = train(change=shrink, steps=18), train(Graphs(counting), change=shrink, steps=18)
    assert counting.recordings == 4 + 3, "of the lower level three and two: each upper step that warms up drops one"
    assert replayed[0] == expected[0]
    assert "lower batches have changed in shape: CUDA graphs are recorded anew" in caplog.text


def test_a_recording_that_breaks_off_in_backward_leaves_no_gradients(caplog):
    """The next backward pass would add to those that are there."""
    expected, (lower, _) = make_levels(*make_models())[0], make_levels(*make_models())
    first, reason = next(lower.optimizer.flat.module.parameters()), "operation not permitted when stream is capturing"
    recording = []

    def broken(_):
        if recording:
            raise RuntimeError(reason)

    def record(call):
        recording.append(1)
        try:
            return on_the_cpu(call)
        finally:
            recording.pop()

    first.register_post_accumulate_grad_hook(broken)
    graphs = Graphs(record)
    for step in range(WARMUP + 2):
        graphs(lower, lower.batches(step))
        move(expected, expected.batches(step))
    assert graphs.record is None
    assert caplog.messages == [f"no CUDA graph of the lower step, it runs without: {reason}"]
    for name, value in expected.optimizer.flat.state_dict().items():
        assert torch.equal(lower.optimizer.flat.state_dict()[name], value), name


def test_a_recording_that_another_process_cannot_make_is_dropped(caplog):
    """All ranks go on without: one alone cannot replay what it shares with others."""
    asked, can = [], iter([True, False])

    def all_can(mine):
        asked.append(mine)
        return next(can)

    recorder = Recorder(on_the_cpu, "--no-graphs", all_can)
    found = [recorder("key", "step", lambda: torch.ones(()) + 1) for _ in range(WARMUP + 2)]
    assert [x.item() for x in found] == [2] * (WARMUP + 2)
    assert asked == [True, True], "before a recording, and after it"
    assert recorder.record is None
    assert caplog.messages == ["no CUDA graph of the step, it runs without: another process cannot record it"]


def test_what_cannot_be_recorded_runs_without(caplog):
    """A step that reads a tensor: the reason is said once, and the run is the same."""

    def reading(call):
        return on_the_cpu(lambda: (call(), torch.ones(()).item())[0])

    expected, eager = plain(), train(Graphs(reading))
    assert eager[0] == expected[0]
    torch.testing.assert_close(eager[1], expected[1], rtol=0, atol=0)
    assert caplog.messages == [
        "no CUDA graph of the lower step, it runs without: operation not permitted when stream is capturing: "
        "_local_scalar_dense"
    ]


class Cuda:
    """`torch.cuda` without a GPU, as far as `cuda_recorder` asks it; a capture that a reader broke off ends badly."""

    class CUDAGraph:
        def replay(self):
            pass

    def __init__(self):
        self.pools, self.asked, self.lost = 0, [], False

    def graph_pool_handle(self):
        self.pools += 1
        return self.pools

    def synchronize(self, device):
        assert not self.lost, "a capture that never ended"

    def current_stream(self, device):
        return None

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.asked.append(pool)
        try:
            yield
        except AssertionError:
            self.lost = True
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904


@pytest.fixture
def cuda(monkeypatch):
    cuda = Cuda()
    for name in ("CUDAGraph", "graph_pool_handle", "synchronize", "current_stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    return cuda


def test_a_capture_that_cuda_broke_off_ends_the_run_and_says_why(cuda):
    """torch says only that something went wrong before; and what would ask its allocator is not called."""
    graphs, (lower, _), calls = Graphs(cuda_recorder(torch.device("cuda"))), make_levels(*make_models()), []

    def gradient(batch):
        calls.append(1)
        if len(calls) > WARMUP:
            raise AssertionError("operation not permitted when stream is capturing\nand more")
        return lower.gradient(batch)

    broken = replace(lower, gradient=gradient)
    for number in range(WARMUP):
        graphs(broken, make_batch(0, number))
    message = (
        "the lower step cannot be recorded as a CUDA graph: operation not permitted when stream is capturing; "
        "wanted --no-graphs"
    )
    with pytest.raises(UserError, match=f"^{message}$"):
        graphs(broken, make_batch(0, WARMUP))
    assert len(calls) == WARMUP + 1


def test_a_capture_that_ended_is_done_without_and_holds_nothing(cuda, caplog):
    """Such as one that ran out of memory. The error that is said must not keep what the recording held."""
    recorder, held = Recorder(cuda_recorder(torch.device("cuda")), "--no-graphs"), []

    class Activations:
        pass

    def call():
        activations = Activations()
        assert not [one for one in held if one() is not None]
        held.append(weakref.ref(activations))
        if len(held) == WARMUP + 1:
            raise RuntimeError("out of memory\nand more")
        return len(held)

    assert [recorder("key", "step", call) for _ in range(WARMUP + 2)] == [1, 2, 3, 5, 6]
    assert caplog.messages == ["no CUDA graph of the step, it runs without: out of memory"]


def test_recordings_share_a_pool_that_none_has_left(cuda):
    """torch takes no graph into a pool that all graphs have left while a tensor of theirs lives."""
    recorder = Recorder(cuda_recorder(torch.device("cuda")), "--no-graphs")
    for key in ("a", "b"):
        for _ in range(WARMUP + 1):
            recorder(key, key, lambda: None)
    recorder.release()
    recorder("a", "a", lambda: None)
    first, second, third = cuda.asked
    assert first == second != third


def test_where_there_is_no_cuda_nothing_is_recorded():
    assert cuda_recorder(torch.device("cpu")) is None
    assert train(Graphs(None), steps=4)[0] == train(steps=4)[0]


def test_errors_of_the_step_itself_are_not_taken_for_a_failed_recording():
    lower, _ = make_levels(*make_models())
    graphs = Graphs(on_the_cpu)
    broken = replace(lower, gradient=lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        graphs(broken, make_batch(0, 0))


@pytest.mark.gpu
def test_a_cuda_graph_is_the_same_run_and_waits_for_nothing():
    """Real graphs; and from the first replay on, no step waits for the device."""
    device = torch.device("cuda")
    with side_stream(device):
        expected = train(device="cuda")
        counting = Counting(cuda_recorder(device))
        replayed = train(Graphs(counting), device="cuda")
        assert counting.recordings == 2
        for a, b in zip(expected[0], replayed[0], strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        lower, upper = make_levels(*make_models(), device="cuda")
        graphs, batches = (
            Graphs(cuda_recorder(device)),
            [[level.batches(n) for n in range(6)] for level in (lower, upper)],
        )
        torch.cuda.synchronize()
        for n in range(6):
            if n == 5:
                torch.cuda.set_sync_debug_mode("error")
            try:
                graphs(lower, batches[0][n])
                graphs(upper, batches[1][n])
            finally:
                torch.cuda.set_sync_debug_mode("default")
