"""CUDA graphs: calls on tensors of fixed shapes, recorded once and replayed as one launch each.

The first `WARMUP` calls run as they are, on the stream that will be recorded: libraries choose their algorithms, lazily
made buffers come to be. The next call is recorded, and every later one copies its inputs to where the recorded ones lie
and replays it. Where there is no CUDA, or a recording fails, calls run as they are, and one line says why.
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARMUP = 3

Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Records a call: what replays it, and what it returned; RuntimeError where the call cannot be recorded."""

_log = logging.getLogger(__name__)


class Recorder:
    """Runs calls, and replays those that it has recorded.

    Args:
        record: Records a call (`cuda_recorder`); None runs every call as it is. Calls must then be made on a stream
            that can be captured (`side_stream`).
    """

    def __init__(self, record: Record | None):
        self.record = record
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
        """
        if self.record is None:
            return call(*inputs)
        if key not in self._recorded:
            if self._warm.setdefault(key, 0) < WARMUP:
                self._warm[key] += 1
                return call(*inputs)
            mine = tuple(None if x is None else x.clone() for x in inputs)
            try:
                replay, outputs = self.record(lambda: call(*mine))
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                _log.warning("no CUDA graph of the %s, it runs without: %s", name, reason)
                self.record = None
                self.forget()
                return call(*inputs)
            self._recorded[key] = _Recorded(mine, replay, outputs)
        return self._recorded[key](inputs)

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


def cuda_recorder(device: torch.device) -> Record | None:
    """Records CUDA graphs, all in one memory pool; None where the device is no GPU.

    Calls must be on a `side_stream` from the first: what autograd makes then belongs to the stream it was made on.
    """
    if device.type != "cuda":
        return None
    pool = torch.cuda.graph_pool_handle()

    def record(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        try:
            stream = torch.cuda.current_stream(device)
            # thread_local: meanwhile the loader's thread may allocate and pin memory
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                outputs = call()
        except BaseException:
            torch.cuda.synchronize(device)
            raise
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
