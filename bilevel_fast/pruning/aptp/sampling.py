"""Which model samples which prompts of a mixture, for `generate`: expert by expert, or all of them in one batch."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bilevel_fast.models.folder import ModelFolder, load_unet
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning.aptp.mixed import Mix
from bilevel_fast.pruning.aptp.mixture_folder import Mixture
from bilevel_fast.sampling.generate import Model

Part = tuple[Sequence[int], UNet, Callable[[slice], Model] | None]
"""Numbers of the prompts, the UNet to sample them with, and what `generate` calls in its place."""


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
