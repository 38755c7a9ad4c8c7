"""A few prompts to one PNG picture: a row per seed, a column per prompt."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bilevel_fast.base.claims import claimed
from bilevel_fast.base.devices import compute_dtype, pick_device
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import write_atomic
from bilevel_fast.sampling.generate import generate
from bilevel_fast.sampling.painter import Load, load_painter
from bilevel_fast.sampling.pictures import picture, png
from bilevel_fast.sampling.safe import safe_of
from bilevel_fast.sampling.samplers import Method
from bilevel_fast.sampling.strength import Strength
from bilevel_fast.sampling.to_folder import check_size


@dataclass(frozen=True)
class GridFlags:
    """What a grid is made of. A folder of `sample` shares all of it but `prompts` and `out`."""

    prompts: tuple[str, ...] = ()
    """What to draw into a grid."""
    model: Path | None = None
    """Model folder, a teacher or a student, or its id on the hub; `mini` and `emoji` are the
    built-in teachers. Default: mini."""
    mixture: Path | None = None
    """Mixture folder: each prompt is sampled by one of its experts. If --model names the dense model that they were cut
    from, a grid is sampled in one batch, from its weights: what experts have learned since is not used."""
    prompt_encoder: Path | None = None
    """Where the sentence encoder is, if the mixture has one and it is not where it was."""
    out: Path | None = None
    """The grid; an existing file is refused. Default: grid.png."""
    seeds: tuple[int, ...] = (0,)
    """A grid's rows; all prompts of a row start from the same noise. A folder takes one; noise is of seed and id."""
    steps: int = 25
    """Sampling steps."""
    guidance: float | None = None
    """Classifier-free guidance scale. Default: 3 for a built-in world, 5 for Stable Diffusion XL, else 7.5."""
    method: Method = "pndm"
    """Sampler."""
    safe: str | None = None
    """Text of a concept to keep away from while sampling, whatever the model has learnt (Safe Latent Diffusion); a call
    of the network then has a third row for each image."""
    safe_strength: Strength | None = None
    """How hard. Default: medium. All four are the paper's, for 50 steps; warm-ups of 15, 10, 7 and 0 of them."""
    size: int | None = None
    """Height and width of the latents. Default: what the model was made for; in a folder 64 (512 pixels) at most, XL's
    excepted."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""


def draw_grid(model: Path, asked: GridFlags, load: Load = load_painter) -> Path:
    """Sample every prompt from the noise of every seed, and write the picture.

    Args:
        model: A folder that `load` loads.
        asked: What a grid is made of, but for the model.
        load: Loads what draws.

    Returns:
        Where it is.

    Raises:
        UserError: Bad input of any kind.
    """
    out = asked.out or Path("grid.png")
    if not asked.prompts or not asked.seeds:
        raise UserError("--prompts and --seeds want at least one value")
    if (safe := safe_of(asked.safe, asked.safe_strength)) is not None:
        safe.check(asked.steps)
    with claimed(out):
        _draw(model, asked, out, load)
    return out


def _draw(model: Path, asked: GridFlags, out: Path, load: Load) -> None:
    prompts, seeds = asked.prompts, asked.seeds
    place = pick_device(asked.device)
    painter = load(model, place)
    folder = painter.folder
    guidance = folder.family.guidance if asked.guidance is None else asked.guidance
    size = folder.config.sample_size if asked.size is None else asked.size
    check_size(size, 2 ** (len(folder.config.block_out_channels) - 1))
    images: dict[tuple[int, int], Tensor] = {}
    for numbers, unet, call in painter.parts(prompts):
        # who answers in its place does so in a precision of its own
        unet.to(place, compute_dtype("auto", place) if call is None else torch.float32)
        for seed in seeds:
            latents = generate(
                unet, folder.schedule, folder.text_encoder, [prompts[n] for n in numbers], [0] * len(numbers),
                seed=seed, size=(size, size), guidance=guidance, steps=asked.steps, method=asked.method,
                model=call, safe=safe_of(asked.safe, asked.safe_strength),
            )  # fmt: skip
            for n, latent in zip(numbers, latents, strict=True):
                images[seed, n] = folder.vae.decode(latent[None].to(place)).cpu()
        del unet, call
    rows = {f"seed {s}": torch.cat([images[s, n] for n in range(len(prompts))]) for s in seeds}
    zoom = max(1, 128 // next(iter(rows.values())).shape[-1])
    write_atomic(out, png(picture(rows, prompts, zoom)))
