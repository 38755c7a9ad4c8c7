"""What the memory model says about the rehearsal's training, and what its process holds besides.

    python -m benchmarks.real_size.memory memory.json

The model (`bilevel_fast.profiling.memory`) counts what a training takes of a GPU: the levels of one student. On a CPU
the same process holds the interpreter and its libraries, and the text encoder and the VAE in fp32, which on a GPU stay
on the host. Those are measured here, in a process that has imported what a training imports and loaded what it loads,
before it makes the levels. What the model assumes for CUDA (`OUTSIDE`) is taken off. Not in the model and not measured:
what oneDNN holds while an op runs, and what malloc does not give back.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

import bilevel_fast.runs.session  # noqa: F401  # all that a training imports
from benchmarks.real_size.measuring import status
from benchmarks.real_size.stages import TRAIN
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import write_json
from bilevel_fast.data.cache import Cache
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.structure import Structure
from bilevel_fast.profiling.memory import OUTSIDE
from bilevel_fast.runs.fitting import Fitting
from bilevel_fast.train import parse


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    out: Annotated[Path, tyro.conf.Positional]
    """JSON: bytes by name."""


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.real_size.memory", __doc__)
    libraries = status()["RssAnon"]
    config = parse(TRAIN[1:])
    if config.teacher is None or config.student is None or config.data is None:
        raise UserError("the rehearsal trains on folders")
    folder = load_folder(config.teacher)
    folder.text_encoder.encode([""])
    besides = status()["RssAnon"]
    structure = Structure.load(config.student / "unet" / "structure.json")
    latent, text = Cache.open(config.data).latent_shape[-1], folder.text_encoder.length
    memory = Fitting(config, structure, latent, text, torch.float32).wanted(config.lower.batch)
    parts = memory.parts | {"workspace": memory.workspace - OUTSIDE}
    found = {"model": sum(parts.values()), "besides": besides, "libraries": libraries, "parts": parts}
    write_json(settings.out, found)
    for name, size in (*parts.items(), ("besides: libraries", libraries), ("besides: folder", besides - libraries)):
        print(f"{name:<22}{size / 2**30:7.2f} GiB")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
