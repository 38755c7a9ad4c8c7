"""CUDA graphs of training steps: a whole step of a level (teacher, student, losses, backward, optimizer, statistics) as
one launch (`ops.graphs.Recorder`).

Warm-up steps are steps of the run like all others, so nothing has to be undone. Both levels share one memory pool,
which serves nothing but graphs: a step that runs as it is beside a recording finds none of that memory, and needs as
much again. So recordings are dropped before a step that warms up, and made anew after it. With an upper step after
every 20, that is 3 recordings more, of a second or two each by estimate. To wait with the lower level until the upper
one is warm would be 60 steps without a graph, and any number where the upper level is rare or sets its own pace.

The upper graph reads the teacher's answer where the lower graph leaves it. So if batches change in shape, both graphs
are recorded anew. The steps of an upper level whose eraser cannot be recorded run as they are, and one line says why;
the lower level is recorded all the same.

Ranks that train together record and replay alike: the graph of each holds its part of what they send each other, and
to launch it is a collective call.
"""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from bilevel_fast.data.batch import TENSORS, Batch
from bilevel_fast.ops.graphs import Record, Recorder
from bilevel_fast.scale.team import ALONE, Team
from bilevel_fast.training.levels import AnyLevel, Level, move
from bilevel_fast.training.upper import Terms

_log = logging.getLogger(__name__)

Signature = tuple[tuple[torch.Size, torch.dtype] | None, ...]


class Graphs:
    """Stands for `levels.move`: the same steps, recorded and replayed.

    Args:
        record: As `Recorder`; None runs every step as it is.
        team: Ranks that take the same steps.
    """

    def __init__(self, record: Record | None, team: Team = ALONE):
        self._recorder = Recorder(record, "--no-graphs", lambda can: bool(team.least(can)))
        self._signatures: dict[str, Signature] = {}
        self._eager: set[str] = set()

    @property
    def record(self) -> Record | None:
        """None where steps run as they are, as they do after a recording that failed."""
        return self._recorder.record

    def __call__(self, level: AnyLevel, batch: Batch) -> Terms:
        if self.record is None:
            return move(level, batch)
        if level.eraser is not None and level.eraser.eager:
            if level.name not in self._eager:
                self._eager.add(level.name)
                _log.info("no CUDA graph of the %s step, it runs without: %s", level.name, level.eraser.eager)
            return move(level, batch)
        inputs = [getattr(batch, name) for name in TENSORS]
        signature = tuple(None if x is None else (x.shape, x.dtype) for x in inputs)
        if self._signatures.setdefault(level.name, signature) != signature:
            _log.info("%s batches have changed in shape: CUDA graphs are recorded anew", level.name)
            self._recorder.forget()
            self._signatures = {level.name: signature}

        if self._recorder.warming(level.name):
            self._recorder.release()

        flat = level.optimizer.flat if isinstance(level, Level) else None

        def step(*tensors: Tensor | None) -> Terms:
            try:
                return move(level, replace(batch, **dict(zip(TENSORS, tensors, strict=True))))
            except BaseException:
                if flat is not None:
                    flat.forget()
                raise

        terms = self._recorder(level.name, f"{level.name} step", step, *inputs)
        if flat is not None:
            flat.moved()  # a replay says nothing to Python
        return terms

    def forget(self) -> None:
        """Drop all recordings, as must be done before the ranks part."""
        self._recorder.forget()
