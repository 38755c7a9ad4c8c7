"""Sample prompts to a PNG grid, with any model folder or a mixture of experts: one row per seed, one column per prompt.

python -m bilevel_fast.sample --prompts "a red star" "a red star in the style of waves" --seeds 0 1 --out grid.png
python -m bilevel_fast.sample --prompts "a red star" "a blue ring" --mixture runs/aptp
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bilevel_fast import errors, flags, report
from bilevel_fast.errors import UserError
from bilevel_fast.files import write_atomic
from bilevel_fast.folder import load_folder
from bilevel_fast.generate import generate
from bilevel_fast.mini import TEACHER
from bilevel_fast.pruning.aptp.mixture_folder import Mixture
from bilevel_fast.pruning.aptp.sampling import Part, expert_by_expert, one_batch
from bilevel_fast.samplers import Method
from bilevel_fast.session import pick_device


@dataclass(frozen=True)
class SampleConfig:
    """Settings of `sample`."""

    prompts: tuple[str, ...]
    """What to draw."""
    model: Path | None = None
    """Model folder: a teacher or a student. Default: the built-in mini teacher."""
    mixture: Path | None = None
    """Mixture folder: each prompt is sampled by one of its experts. If --model names the dense model that they were cut
    from, all are sampled in one batch, from its weights: what experts have learned since is not used."""
    prompt_encoder: Path | None = None
    """Where the sentence encoder is, if the mixture has one and it is not where it was."""
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
    if config.mixture is None:
        if config.prompt_encoder is not None:
            raise UserError("--prompt-encoder is for the router of a --mixture, and none was named")
        folder = load_folder(config.model or TEACHER, device)
        parts: Iterable[Part] = [(range(len(config.prompts)), folder.unet(), None)]
    else:
        mixture = Mixture.load(config.mixture, prompt_encoder=config.prompt_encoder, device=device)
        folder = mixture.parts if config.model is None else load_folder(config.model, device)
        expert = mixture.route(config.prompts)
        for number, prompt in zip(expert.tolist(), config.prompts, strict=True):
            print(f"expert {number}  {prompt}")
        whole = config.model is not None
        parts = one_batch(mixture, folder, expert, device) if whole else expert_by_expert(mixture, expert)
    guidance = config.guidance if config.guidance is not None else 3.0 if folder.is_mini else 7.5
    size = config.size or folder.config.sample_size
    images: dict[tuple[int, int], Tensor] = {}
    for numbers, unet, model in parts:
        unet.to(device)
        for seed in config.seeds:
            latents = generate(
                unet, folder.schedule, folder.text_encoder, [config.prompts[n] for n in numbers], [0] * len(numbers),
                seed=seed, size=(size, size), guidance=guidance, steps=config.steps, method=config.method, model=model,
            )  # fmt: skip
            for n, latent in zip(numbers, latents, strict=True):
                images[seed, n] = folder.vae.decode(latent[None].to(device)).cpu()
        del unet, model
    rows = {f"seed {s}": torch.cat([images[s, n] for n in range(len(config.prompts))]) for s in config.seeds}
    zoom = max(1, 128 // next(iter(rows.values())).shape[-1])
    write_atomic(config.out, report.png(report.picture(rows, config.prompts, zoom)))
    print(config.out)


if __name__ == "__main__":
    sys.exit(errors.run(main))
