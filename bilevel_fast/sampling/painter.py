"""What prompts are sampled with: a model folder, or one of several UNets for each prompt."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bilevel_fast.models.folder import ModelFolder, load_folder
from bilevel_fast.models.unet import UNet
from bilevel_fast.models.weights import fingerprint
from bilevel_fast.sampling.generate import Model

Part = tuple[Sequence[int], UNet, Callable[[slice], Model] | None]
"""Numbers of the prompts, the UNet to sample them with, and what `generate` calls in its place."""


@dataclass(frozen=True)
class Painter:
    """A loaded model.

    Attributes:
        folder: Everything but the UNets.
        fingerprints: Says which UNets sample, for the index of a folder of images; reads all their files.
        parts: Which UNet samples which of some prompts. The UNets are read one at a time, on the CPU or the painter's
            device.
    """

    folder: ModelFolder
    fingerprints: Callable[[], dict[str, Any]]
    parts: Callable[[Sequence[str]], Iterable[Part]]


Load = Callable[[Path, torch.device], Painter]
"""Loads a painter from a folder to a device."""


def load_painter(path: Path, device: torch.device) -> Painter:
    """One model folder, dense or pruned.

    Raises:
        UserError: As `load_folder`.
    """
    folder = load_folder(path, device)

    def parts(prompts: Sequence[str]) -> list[Part]:
        return [(range(len(prompts)), folder.unet(), None)] if prompts else []

    return Painter(folder, lambda: {"unet": fingerprint(folder.path / "unet")}, parts)
