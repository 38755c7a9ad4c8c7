"""A frozen UNet whose calls are CUDA graphs: sampling calls it tens of thousands of times on a few shapes.

As in `graphs.py`, the first `WARMUP` calls of a shape run as they are and the next one is recorded. Recording is left
where there is no CUDA, and given up, with one line that says why, where it fails.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_fast.models.unet import Prediction
from bilevel_fast.training.graphs import WARMUP, Record

_log = logging.getLogger(__name__)

Inputs = tuple[Tensor, Tensor, Tensor]


class Captured:
    """Stands for a UNet in `samplers.guided`: x (B, C, H, W), t (B,), text (B, L, D) -> `.out` (B, C, H, W).

    The answer is a tensor of its own, which later calls leave alone; the block outputs are not kept.

    Args:
        unet: Whose weights stay where they are as long as this is used.
        record: Records a call (`graphs.cuda_recorder`); None runs every call as it is. Calls must then be made on a
            stream that can be captured (`graphs.side_stream`).
    """

    def __init__(self, unet: Callable[[Tensor, Tensor, Tensor], Prediction], record: Record | None):
        self.unet, self.record = unet, record
        self._warm: dict[object, int] = {}
        self._recorded: dict[object, _Recorded] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Prediction:
        if self.record is None:
            return Prediction(self.unet(x, t, text).out, ())
        shape = tuple((tensor.shape, tensor.dtype) for tensor in (x, t, text))
        if shape not in self._recorded:
            if self._warm.setdefault(shape, 0) < WARMUP:
                self._warm[shape] += 1
                return Prediction(self.unet(x, t, text).out, ())
            recorded = self._try((x, t, text))
            if recorded is None:
                return Prediction(self.unet(x, t, text).out, ())
            self._recorded[shape] = recorded
        return Prediction(self._recorded[shape]((x, t, text)), ())

    def _try(self, now: Inputs) -> "_Recorded | None":
        assert self.record is not None
        x, t, text = (tensor.clone() for tensor in now)
        try:
            replay, answer = self.record(lambda: {"out": self.unet(x, t, text).out})
        except RuntimeError as error:
            _log.warning("no CUDA graph of the UNet, it runs without: %s", str(error).strip().splitlines()[0])
            self.record = None
            self._recorded.clear()
            return None
        return _Recorded((x, t, text), replay, answer["out"])


@dataclass(frozen=True)
class _Recorded:
    inputs: Inputs
    replay: Callable[[], None]
    out: Tensor

    def __call__(self, now: Inputs) -> Tensor:
        for mine, theirs in zip(self.inputs, now, strict=True):
            mine.copy_(theirs, non_blocking=True)
        self.replay()
        return self.out.clone()
