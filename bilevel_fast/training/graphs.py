"""CUDA graphs: a whole step of a level (teacher, student, losses, backward, optimizer, statistics) as one launch.

A level's first `WARMUP` steps run as they are, on the stream that will be recorded: libraries choose their algorithms,
lazily made buffers come to be. The next one is recorded and replayed from then on, with its batch copied to where the
recorded one lay. Warm-up steps are steps of the run like all others, so nothing has to be undone.

Both levels share one memory pool. The upper graph reads the teacher's answer where the lower graph leaves it. So if
batches change in shape, both graphs are recorded anew.

Where there is no CUDA, or a recording fails, steps run as they are, and one line says why. So do the steps of an upper
level whose eraser cannot be recorded; the lower level is recorded all the same.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_fast.data.batches import Batch
from bilevel_fast.training.levels import AnyLevel, move
from bilevel_fast.training.upper import Terms

WARMUP = 3

_log = logging.getLogger(__name__)

# records a call: (what replays it, what it returned), or RuntimeError
Record = Callable[[Callable[[], Terms]], tuple[Callable[[], None], Terms]]
Signature = tuple[tuple[torch.Size, torch.dtype] | None, ...]


class Graphs:
    """Stands for `bilevel.move`: the same steps, recorded and replayed.

    Args:
        record: Records a call and returns what replays it and what it returned; None runs every step as it is.
    """

    def __init__(self, record: Record | None):
        self.record = record
        self._recorded: dict[str, _Recorded] = {}
        self._signatures: dict[str, Signature] = {}
        self._warm: dict[str, int] = {}
        self._eager: set[str] = set()

    def __call__(self, level: AnyLevel, batch: Batch) -> Terms:
        if self.record is None:
            return move(level, batch)
        if level.eraser is not None and level.eraser.eager:
            if level.name not in self._eager:
                self._eager.add(level.name)
                _log.info("no CUDA graph of the %s step, it runs without: %s", level.name, level.eraser.eager)
            return move(level, batch)
        signature = _signature(batch)
        if self._signatures.setdefault(level.name, signature) != signature:
            _log.info("%s batches have changed in shape: CUDA graphs are recorded anew", level.name)
            self._recorded, self._warm, self._signatures = {}, {}, {level.name: signature}
        if level.name not in self._recorded:
            if self._warm.setdefault(level.name, 0) < WARMUP:
                self._warm[level.name] += 1
                return move(level, batch)
            recorded = self._try(level, batch)
            if recorded is None:
                return move(level, batch)
            self._recorded[level.name] = recorded
        return self._recorded[level.name](batch)

    def _try(self, level: AnyLevel, batch: Batch) -> "_Recorded | None":
        assert self.record is not None
        inputs = batch.map(torch.clone)
        try:
            replay, terms = self.record(lambda: move(level, inputs))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            _log.warning("no CUDA graph of the %s step, it runs without: %s", level.name, reason)
            self.record = None
            self._recorded.clear()
            return None
        return _Recorded(inputs, replay, terms)


@dataclass(frozen=True)
class _Recorded:
    inputs: Batch
    replay: Callable[[], None]
    terms: Terms

    def __call__(self, batch: Batch) -> Terms:
        for mine, theirs in zip(_tensors(self.inputs), _tensors(batch), strict=True):
            mine.copy_(theirs, non_blocking=True)
        self.replay()
        return self.terms


def cuda_recorder(device: torch.device) -> Record | None:
    """Records CUDA graphs, all in one memory pool; None where the device is no GPU.

    Steps must be on a `side_stream` from the first: what autograd makes then belongs to the stream it was made on.
    """
    if device.type != "cuda":
        return None
    pool = torch.cuda.graph_pool_handle()

    def record(call: Callable[[], Terms]) -> tuple[Callable[[], None], Terms]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        try:
            stream = torch.cuda.current_stream(device)
            # thread_local: meanwhile the loader's thread may allocate and pin memory
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                terms = call()
        except BaseException:
            torch.cuda.synchronize(device)
            raise
        return graph.replay, terms

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


def _tensors(batch: Batch) -> list[Tensor]:
    every = (batch.latents, batch.text, batch.anchor, batch.eps, batch.t)
    return [x for x in every if x is not None]


def _signature(batch: Batch) -> Signature:
    every = (batch.latents, batch.text, batch.anchor, batch.eps, batch.t)
    return tuple(None if x is None else (x.shape, x.dtype) for x in every)
