"""Sample prompts to a PNG grid, with any model folder: one row per seed, one column per prompt.

python -m bilevel_fast.sample --prompts "a red star" "a red star in the style of waves" --seeds 0 1 --out grid.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from bilevel_fast import errors, flags, report
from bilevel_fast.errors import UserError
from bilevel_fast.files import write_atomic
from bilevel_fast.folder import load_folder
from bilevel_fast.generate import generate
from bilevel_fast.mini import TEACHER
from bilevel_fast.samplers import Method
from bilevel_fast.session import pick_device


@dataclass(frozen=True)
class SampleConfig:
    """Settings of `sample`."""

    prompts: tuple[str, ...]
    """What to draw."""
    model: Path = TEACHER
    """Model folder: a teacher or a student. Default: the built-in mini teacher."""
    out: Path = Path("grid.png")
    """The picture; an existing file is refused."""
    seeds: tuple[int, ...] = (0,)
    """One row each; all prompts of a row start from the same noise."""
    steps: int = 25
    """Sampling steps."""
    guidance: float | None = None
    """Classifier-free guidance scale. Default: 3 for the mini world, 7.5 otherwise."""
    method: Method = "pndm"
    """Sampler."""
    size: int | None = None
    """Height and width of the latents. Default: what the model was made for."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""


def main() -> None:
    config = flags.parse(SampleConfig, "bilevel_fast.sample", __doc__)
    if not config.prompts or not config.seeds:
        raise UserError("--prompts and --seeds want at least one value")
    if config.out.exists():
        raise UserError(f"{config.out} exists already; delete it or choose another --out")
    device = pick_device(config.device)
    folder = load_folder(config.model, device)
    unet = folder.unet().to(device)
    guidance = config.guidance if config.guidance is not None else 3.0 if folder.is_mini else 7.5
    size = config.size or folder.config.sample_size
    rows: dict[str, torch.Tensor] = {}
    for seed in config.seeds:
        latents = generate(
            unet, folder.schedule, folder.text_encoder, config.prompts, [0] * len(config.prompts),
            seed=seed, size=(size, size), guidance=guidance, steps=config.steps, method=config.method,
        )  # fmt: skip
        images = [folder.vae.decode(latent[None].to(device)).cpu() for latent in latents]
        rows[f"seed {seed}"] = torch.cat(images)
    zoom = max(1, 128 // next(iter(rows.values())).shape[-1])
    write_atomic(config.out, report.png(report.picture(rows, config.prompts, zoom)))
    print(config.out)


if __name__ == "__main__":
    sys.exit(errors.run(main))
