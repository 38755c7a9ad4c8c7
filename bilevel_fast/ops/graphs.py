"""CUDA graphs: calls on tensors of fixed shapes, recorded once and replayed as one launch each.

The first `WARMUP` calls run as they are, on the stream that will be recorded: libraries choose their algorithms, lazily
made buffers come to be. The next call is recorded, and every later one copies its inputs to where the recorded ones lie
and replays it. Where there is no CUDA, or a call cannot be recorded, calls run as they are, and one line says why. A
recording that CUDA itself breaks off is the end: see `CaptureLost`.
"""

import logging
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError

WARMUP = 3

Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Records a call: what replays it, and what it returned; RuntimeError where the call cannot be recorded."""

_log = logging.getLogger(__name__)


class CaptureLost(RuntimeError):
    """CUDA has broken a recording off, and torch did not come to tell its allocator and its random numbers that it has
    ended. Whatever asks these again may fail an assertion, so nothing can go on without the recording."""


class Recorder:
    """Runs calls, and replays those that it has recorded.

    Args:
        record: Records a call (`cuda_recorder`); None runs every call as it is. Calls must then be made on a stream
            that can be captured (`side_stream`).
        way_out: What makes the next run do without recordings, for the line about a lost one: a flag.
        all_can: all_can(this_one) is whether all processes that make the same calls can record one: none can replay
            alone what it shares with others. Each of them asks at the same times.
    """

    def __init__(self, record: Record | None, way_out: str, all_can: Callable[[bool], bool] = bool):
        self.record, self._way_out, self._all_can = record, way_out, all_can
        self._warm: dict[Hashable, int] = {}
        self._recorded: dict[Hashable, _Recorded] = {}

    def __call__(self, key: Hashable, name: str, call: Callable[..., Any], *inputs: Tensor | None) -> Any:
        """`call(*inputs)`, or the tensors that its recording writes: the same ones in every replay.

        Args:
            key: Of the recording. All calls of a key have inputs of the same shapes and dtypes, and do the same.
            name: What is called, for the line about a recording that failed.
            call: Reads nothing back from the device; everything that changes from call to call is a tensor that stays
                where it is.
            inputs: Copied to the recording's own tensors before a replay.

        Raises:
            UserError: The recording was lost; says over what.
        """
        if self.record is None:
            return call(*inputs)
        if key not in self._recorded:
            if self._warm.setdefault(key, 0) < WARMUP:
                self._warm[key] += 1
                return call(*inputs)
            mine = tuple(None if x is None else x.clone() for x in inputs)
            if recorded := self._try(name, lambda: call(*mine)):
                self._recorded[key] = _Recorded(mine, *recorded)
        # not where the error was caught: it keeps what the failed recording holds
        return self._recorded[key](inputs) if key in self._recorded else call(*inputs)

    def _try(self, name: str, call: Callable[[], Any]) -> tuple[Callable[[], None], Any] | None:
        assert self.record is not None
        found = None
        self._all_can(True)  # nobody records while another still runs what came before
        try:
            found = self.record(call)
        except CaptureLost as error:
            raise UserError(
                f"the {name} cannot be recorded as a CUDA graph: {_reason(error)}; wanted {self._way_out}"
            ) from error
        except RuntimeError as error:
            _log.warning("no CUDA graph of the %s, it runs without: %s", name, _reason(error))
        if self._all_can(found is not None):
            return found
        if found is not None:
            _log.warning("no CUDA graph of the %s, it runs without: another process cannot record it", name)
        self.record = found = None
        self.forget()
        return None

    def warming(self, key: Hashable) -> bool:
        """Whether the next call of a key runs as it is, to be recorded later."""
        return self.record is not None and self._warm.get(key, 0) < WARMUP

    def release(self) -> None:
        """Drop all recordings and their memory; what is warm is recorded anew at its next call."""
        self._recorded.clear()

    def forget(self) -> None:
        """Drop all recordings; each key warms up and is recorded anew."""
        self._recorded.clear()
        self._warm.clear()


@dataclass(frozen=True)
class _Recorded:
    inputs: tuple[Tensor | None, ...]
    replay: Callable[[], None]
    outputs: Any

    def __call__(self, inputs: tuple[Tensor | None, ...]) -> Any:
        for mine, theirs in zip(self.inputs, inputs, strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs, non_blocking=True)
        self.replay()
        return self.outputs


def _reason(error: BaseException) -> str:
    """The first line of what began it: ending a capture raises over what went wrong within."""
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = inner
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cuda_recorder(device: torch.device) -> Record | None:
    """Records CUDA graphs, all that live at a time in one memory pool; None where the device is no GPU.

    Calls must be on a `side_stream` from the first: what autograd makes then belongs to the stream it was made on.
    """
    if device.type != "cuda":
        return None
    alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
    pool = torch.cuda.graph_pool_handle()

    def record(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        nonlocal pool
        graph, inner = torch.cuda.CUDAGraph(), None
        torch.cuda.synchronize(device)
        if not alive:  # torch takes none into a pool that all graphs have left
            pool = torch.cuda.graph_pool_handle()
        try:
            stream = torch.cuda.current_stream(device)
            # thread_local: meanwhile the loader's thread may allocate and pin memory
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                try:
                    outputs = call()
                except BaseException as error:
                    inner = error
                    raise
        except RuntimeError as error:
            if error is inner:  # the capture has ended as it should
                torch.cuda.synchronize(device)
                raise
            raise CaptureLost from error
        finally:
            inner = None  # an error in a frame that it holds would live on, with all that the call has made
        alive.add(graph)
        return graph.replay, outputs

    return record


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Within, work goes to a stream that can be captured, which the default stream cannot. It and others meet twice."""
    torch.cuda.synchronize(device)
    try:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            yield
    finally:
        torch.cuda.synchronize(device)
