"""The networks of a model as graphs, by torch.export: ONNX files and torch's own. Batch, height and width are free.

    unet/model.onnx  text_encoder/model.onnx  vae_decoder/model.onnx     or model.pt2 in the place of each

A graph is read again by what will run it, and compared with the model at two sizes and two batches.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError, require
from bilevel_fast.exporting.parts import Part
from bilevel_fast.ops.providers import ops

TOLERANCE = 1e-3
"""Of the largest number that the model gives."""
_TRACED = (2, 16, 24)
_TRIED = ((1, 16, 16), (3, 24, 40))
"""Batch, height and width of latents: what a graph is made with, and what it is tried with."""
_INLINE = 2**30
"""Bytes of weights up to which they lie within the ONNX file, which cannot have more than 2 GiB."""


def write_onnx(part: Part, folder: Path) -> float:
    """Write `folder/model.onnx`, and `model.onnx.data` beside it where the weights are large.

    Returns:
        How far onnxruntime's results are from the model's, as a share of the largest number.

    Raises:
        UserError: onnx, onnxscript or onnxruntime is missing, or onnxruntime computes something else.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(name, "onnx")
    runtime, path = require("onnxruntime", "onnx"), folder / "model.onnx"
    with _tracing():
        torch.onnx.export(
            part.module,
            part.example(*_TRACED),
            path,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_shapes=_shapes(part, lambda name: name),
            external_data=sum(each.numel() * each.element_size() for each in part.module.parameters()) > _INLINE,
            verbose=False,
        )
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(given: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: each.numpy() for name, each in zip(part.inputs, given, strict=True)}
        return [torch.from_numpy(np.asarray(each)) for each in session.run(list(part.outputs), feed)]

    return _compare(part, run, "onnxruntime")


def write_torch(part: Part, folder: Path) -> float:
    """Write `folder/model.pt2`, for torch.export.load.

    Returns:
        As `write_onnx`, of the program that was read again.

    Raises:
        UserError: It computes something else.
    """
    path = folder / "model.pt2"
    with _tracing():
        program = torch.export.export(part.module, part.example(*_TRACED), dynamic_shapes=_shapes(part, _dynamic))
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()

    def run(given: Sequence[Tensor]) -> list[Tensor]:
        found = loaded(*given)
        return list(found) if isinstance(found, tuple) else [found]

    return _compare(part, run, "torch.export")


def _dynamic(_: str) -> object:
    return torch.export.Dim.DYNAMIC  # which may not become a number, and has the range that it turns out to have


def _shapes(part: Part, free: Callable[[str], object]) -> tuple[object, ...]:
    """What torch.export wants to know of the axes of each input."""
    return tuple({axis: free(name) for axis, name in axes.items()} for axes in part.inputs.values())


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """With ops that other programs have, without gradients, and without what the exporters tell their makers."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "torch._dynamo")]
    levels = [log.level for log in logs]
    with ops("torch"), torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for log in logs:
                log.setLevel(logging.ERROR)
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.setLevel(level)


def _compare(part: Part, run: Callable[[Sequence[Tensor]], list[Tensor]], who: str) -> float:
    """The largest difference, as a share of the largest number.

    Raises:
        UserError: It is above the tolerance, or a result has another shape.
    """
    worst = 0.0
    for batch, height, width in _TRIED:
        where, given = f"at batch {batch}, latents {height}x{width}", part.example(batch, height, width)
        with torch.no_grad():
            wanted = part.module(*given)
        try:
            with torch.no_grad():
                found = run(given)
        except Exception as error:  # of a free axis that is none, each says something else
            said = " ".join(str(error).split())
            raise UserError(f"{who} does not run {part.name} {where}: {said}") from error
        expected = wanted if isinstance(wanted, tuple) else (wanted,)
        for name, one, other in zip(part.outputs, expected, found, strict=True):
            share = float((one - other).abs().max() / one.abs().max()) if one.shape == other.shape else float("inf")
            if not share <= TOLERANCE:
                raise UserError(
                    f"{who} computes another {name} of {part.name} than the model {where}, off by {share:.2g} of its "
                    f"largest number; wanted at most {TOLERANCE:g}"
                )
            worst = max(worst, share)
    return worst
