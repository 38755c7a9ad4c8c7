"""A model folder in diffusers, as the README says: `load_pipeline`, and one picture.

python -m benchmarks.real_size.pipeline run/student student.png --side 256
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image

from bilevel_fast import load_pipeline
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Settings of the picture."""

    model: Annotated[Path, tyro.conf.Positional]
    """Model folder."""
    out: Annotated[Path, tyro.conf.Positional]
    """PNG to write."""
    side: int = 512
    """Pixels."""
    steps: int = 2
    """Of the folder's own scheduler."""


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.real_size.pipeline", __doc__)
    pipeline = load_pipeline(settings.model)
    pipeline.set_progress_bar_config(disable=True)
    drawn: Any = pipeline(
        "a red star", height=settings.side, width=settings.side, num_inference_steps=settings.steps, output_type="np",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    image = np.asarray(drawn.images[0])
    if not np.isfinite(image).all():
        raise UserError(f"{settings.model} draws numbers that are not finite")
    Image.fromarray((255 * image).round().astype(np.uint8)).save(settings.out)
    print(f"{settings.out}: {type(pipeline).__name__}, {image.shape[1]} x {image.shape[0]}")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
