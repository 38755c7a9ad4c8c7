"""A frozen UNet whose calls are CUDA graphs: sampling calls it tens of thousands of times on a few shapes."""

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel_fast.models.unet import Prediction
from bilevel_fast.ops.graphs import Record, Recorder


class Captured:
    """Stands for a UNet in `samplers.guided`: x (B, C, H, W), t (B,), text (B, L, D) -> `.out` (B, C, H, W).

    The answer is a tensor of its own, which later calls leave alone; the block outputs are not kept.

    Args:
        unet: Whose weights stay where they are as long as this is used.
        record: As `ops.graphs.Recorder`; each shape of the inputs is a recording.
    """

    def __init__(self, unet: Callable[[Tensor, Tensor, Tensor], Prediction], record: Record | None):
        self.unet, self._recorder = unet, Recorder(record, "--device cpu")

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Prediction:
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in (x, t, text))
        out = self._recorder(shapes, "UNet", lambda *inputs: self.unet(*inputs).out, x, t, text)
        return Prediction(out if self._recorder.record is None else out.clone(), ())
