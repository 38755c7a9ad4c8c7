"""Pixels through NVIDIA DALI: files to views, on the CPU alone or decoded and scaled on a GPU.

DALI draws no random numbers here. Where a view lies is decided outside, by index (`pictures.py`), so a batch can be
made again at any time.

Shape legend: B images, V views, R resolution.
"""

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError, require
from bilevel_fast.data.pictures import Crop

Backend = Literal["cpu", "mixed"]

UNDECODABLE = "the decoder cannot read it"
_NOT_THE_IMAGE = ("out of memory", "bad_alloc", "cuda error", "cuda runtime")
"""In messages of DALI: to drop images for these would be wrong."""


def pick_backend(name: str, device: torch.device) -> Backend:
    """Resolve `auto`: on a GPU where the autoencoder runs on one.

    Raises:
        UserError: It is no backend, or wants a GPU that is not there.
    """
    if name == "auto":
        return "mixed" if device.type == "cuda" else "cpu"
    if name not in ("cpu", "mixed"):
        raise UserError(f"backend {name!r} does not exist; choose from auto, cpu, mixed")
    if name == "mixed" and device.type != "cuda":
        raise UserError(f"backend 'mixed' decodes on a GPU, the device is {device}")
    return name


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))


class Decoder:
    """Decodes, scales with antialiasing, cuts and mirrors.

    Only the part of an image that is seen is scaled; the filter reads beyond its edges, so the pixels are those of the
    scaled image.
    """

    def __init__(
        self, resolution: int, views: int, batch: int, backend: Backend, device: torch.device, threads: int
    ) -> None:
        """Set up; the pipeline is built with the first batch.

        Args:
            resolution: R.
            views: V, of every image.
            batch: Images at a time, at most.
            backend: Where images are decoded and scaled.
            device: Where the pixels are wanted.
            threads: Of the CPU.

        Raises:
            UserError: DALI is not installed.
        """
        self._dali = require("nvidia.dali", "data")
        self._resolution, self._views, self._batch = resolution, views, batch
        self._backend: Backend = backend
        self._device, self._threads = device, threads
        self._pipeline: Any = None

    def __call__(
        self, files: Sequence[bytes], crops: Sequence[Sequence[Crop]]
    ) -> tuple[list[Tensor], list[str | None]]:
        """Views of images.

        Args:
            files: B whole files, at most `batch`.
            crops: V crops of each.

        Returns:
            V times (B, 3, R, R) fp32 pixels in [-1, 1] on the device, zeros where an image cannot be decoded; and per
            image, why not.
        """
        try:
            return self._run(files, crops), [None] * len(files)
        except RuntimeError as error:  # one bad image ends the pipeline: find it in a new one
            self._pipeline = None
            if any(word in str(error).lower() for word in _NOT_THE_IMAGE):
                raise UserError(f"DALI: {' '.join(str(error).split())[-300:]}") from error
        if len(files) == 1:
            shape = 1, 3, self._resolution, self._resolution
            return [torch.zeros(shape, device=self._device) for _ in range(self._views)], [UNDECODABLE]
        alone = [self([file], [crop]) for file, crop in zip(files, crops, strict=True)]
        views = [torch.cat([pixels[view] for pixels, _ in alone]) for view in range(self._views)]
        return views, [reason for _, (reason,) in alone]

    def _run(self, files: Sequence[bytes], crops: Sequence[Sequence[Crop]]) -> list[Tensor]:
        if self._pipeline is None:
            self._pipeline = self._build()
        inputs: dict[str, list[np.ndarray]] = {"files": [np.frombuffer(file, np.uint8) for file in files]}
        for view in range(self._views):
            chosen = [each[view] for each in crops]
            inputs[f"start{view}"] = [np.array(crop.region[0], np.float32) for crop in chosen]
            inputs[f"end{view}"] = [np.array(crop.region[1], np.float32) for crop in chosen]
            inputs[f"mirrored{view}"] = [np.array(crop.mirrored, np.int32) for crop in chosen]
        shapes, *views = self._pipeline.run(**inputs)
        for each, (height, width, _) in zip(crops, np.asarray(shapes.as_array()), strict=True):
            if each[0].size != (height, width):  # an orientation that one library reads and the other does not
                raise RuntimeError(f"an image of {each[0].size} was decoded as {height}x{width}")
        return [torch.from_dlpack(view.as_tensor()).to(self._device) for view in views]

    def _build(self) -> Any:
        fn, types = (require(f"nvidia.dali.{name}", "data") for name in ("fn", "types"))
        gpu = self._backend == "mixed"
        pipeline = require("nvidia.dali.pipeline", "data").Pipeline(
            batch_size=self._batch,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if gpu else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,  # what it gives out is ours: without this, the next batch is written over it
        )
        side = self._resolution
        with pipeline:
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
            shapes = fn.peek_image_shape(files, adjust_orientation=True)
            images = fn.decoders.image(files, device=self._backend, output_type=types.RGB, adjust_orientation=True)
            views = []
            for view in range(self._views):
                start, end = (
                    fn.external_source(name=f"{name}{view}", dtype=types.FLOAT, ndim=1) for name in ("start", "end")
                )
                mirrored = fn.external_source(name=f"mirrored{view}", dtype=types.INT32, ndim=0)
                scaled = fn.resize(
                    images,
                    size=[side, side],
                    roi_start=start,
                    roi_end=end,
                    interp_type=types.INTERP_LINEAR,
                    antialias=True,
                )
                views.append(
                    fn.crop_mirror_normalize(
                        scaled,
                        mirror=mirrored,
                        mean=[127.5] * 3,
                        std=[127.5] * 3,
                        dtype=types.FLOAT,
                        output_layout="CHW",
                    )
                )
            pipeline.set_outputs(shapes, *views)
        pipeline.build()
        return pipeline
