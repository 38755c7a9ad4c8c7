"""What `python -m bilevel_fast.sample` is told: prompts for a grid, or a file of them for a folder."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from bilevel_fast.sampling.prompts import RowFlags
from bilevel_fast.sampling.to_folder import Format, Precision
from bilevel_fast.sampling.to_grid import GridFlags


@dataclass(frozen=True)
class SampleConfig(RowFlags, GridFlags):
    """Settings of `sample`."""

    MAIN: ClassVar = (
        *("prompts", "prompts_file", "model", "mixture", "out", "folder"),
        *("seeds", "steps", "guidance", "batch", "device"),
    )
    GROUPS: ClassVar = {
        "what is drawn": ("prompts", "prompts_file", "model", "mixture", "prompt_encoder"),
        "where to": ("out", "folder", "format"),
        "how": ("seeds", "steps", "guidance", "method", "size", "batch", "precision", "device"),
        "what is kept away": ("safe", "safe_strength"),
        "how --prompts-file is read": (
            *("layout", "prompt_column", "id_column", "seed_column", "duplicates", "limit"),
        ),
    }

    prompts_file: Path | None = None
    """What to draw into --folder: a CSV table with a header, one prompt per line, or COCO's captions (JSON)."""
    folder: Path | None = None
    """Where the images of --prompts-file go; one that was begun with the same settings is gone on with."""
    batch: int = 16
    """Prompts of a folder that are sampled together; another number changes the last bits of an image."""
    precision: Precision = "auto"
    """What the UNet computes a folder in. Default, and for a grid: bf16 on a GPU of sm_80 and later, else fp32."""
    format: Format = "png"
    """PNG pictures, or latents as safetensors."""


FOLDER_ONLY = (*(field.name for field in fields(RowFlags)), "folder", "batch", "precision", "format")
"""Settings that a grid does not read."""
