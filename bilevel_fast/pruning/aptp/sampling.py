"""Mixtures as painters: prompts are sampled expert by expert, or all of them in one batch."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.models.folder import ModelFolder, load_folder, load_unet
from bilevel_fast.models.weights import DIGEST, fingerprint
from bilevel_fast.pruning.aptp.mixed import Mix
from bilevel_fast.pruning.aptp.mixture_folder import INDEX, Mixture
from bilevel_fast.sampling.painter import Painter, Part


def expert_by_expert(mixture: Mixture, expert: Tensor) -> Iterator[Part]:
    """The prompts of one expert after those of another, each with the weights in its folder.

    They are read one at a time.

    Args:
        mixture: Of the experts.
        expert: (B,) int64, that of each prompt.

    Raises:
        UserError: An expert's weights are missing or damaged.
    """
    for number in expert.unique().tolist():
        yield (expert == number).nonzero()[:, 0].tolist(), load_unet(mixture.expert_folder(number)), None


def one_batch(mixture: Mixture, folder: ModelFolder, expert: Tensor, device: torch.device) -> list[Part]:
    """All prompts at once, from the weights of the dense model that the experts were cut from.

    Args:
        mixture: Of the experts.
        folder: Of the dense model.
        expert: (B,) int64, that of each prompt.
        device: To sample on.

    Raises:
        UserError: The experts were not cut from that model.
    """
    mixture.check_teacher(folder)
    unet, mix = folder.unet().to(device), Mix(mixture.structures, device)
    return [(range(len(expert)), unet, lambda rows: mix.bind(unet, expert[rows]))]


def load_mixture(
    path: Path,
    device: torch.device,
    prompt_encoder: Path | None = None,
    dense: Path | None = None,
    say: Callable[[int, str], None] | None = None,
) -> Painter:
    """A mixture whose experts draw the prompts that are routed to them, each with the weights in its folder.

    Args:
        path: The mixture folder.
        device: Of the router and of all components but the UNets.
        prompt_encoder: Where the sentence encoder is, if it is not where it was.
        dense: The model that the experts were cut from: all prompts are then sampled in one batch, from its weights.
        say: Called with the expert of each prompt.

    Raises:
        UserError: It is no mixture, a file of it is missing or damaged, or the experts were not cut from that model.
    """
    mixture = Mixture.load(path, prompt_encoder=prompt_encoder, device=device)
    folder = mixture.parts if dense is None else load_folder(dense, device)

    def fingerprints() -> dict[str, Any]:
        digest = hashlib.sha256((path / INDEX).read_bytes()).hexdigest()[:DIGEST]
        experts = [fingerprint(mixture.expert_folder(k) / "unet") for k in range(len(mixture.structures))]
        return {"mixture": digest, "experts": experts}

    def parts(prompts: Sequence[str]) -> Iterable[Part]:
        if not prompts:
            return []
        expert = mixture.route(prompts)
        for number, prompt in zip(expert.tolist(), prompts, strict=True):
            if say is not None:
                say(number, prompt)
        return expert_by_expert(mixture, expert) if dense is None else one_batch(mixture, folder, expert, device)

    return Painter(folder, fingerprints, parts)
