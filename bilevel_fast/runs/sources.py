"""Where a run's training images come from: `--data`, or the built-in world of the teacher."""

from collections.abc import Sequence
from pathlib import Path

import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.sources import LatentSource
from bilevel_fast.data.stream import open_images
from bilevel_fast.models.folder import ModelFolder
from bilevel_fast.worlds import world


def image_source(
    folder: ModelFolder,
    data: Path | None,
    images: int,
    seed: int,
    erased: Sequence[int] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LatentSource | None:
    """A teacher's own kind of data: latents or images on disk, or drawings of its world, or None.

    Args:
        folder: The teacher's.
        data: Latents or a list of images. None draws images of the model's world; of a model without one it gives None.
        images: How many are drawn.
        seed: Of the drawings.
        erased: The world's concepts that are not drawn.
        device, dtype: Where the VAE encodes images of a list; and, where that is not the CPU, in what.

    Raises:
        UserError: The cache is broken, of another kind, or made with another VAE; or `images` is not positive.
    """
    if images < 1:
        raise UserError(f"--images is {images}, wanted 1 or more")
    if data is not None:
        return open_images(data, folder, device, dtype)
    if folder.family.world is None:
        return None
    return world(folder.family.world).drawn_source(folder, erased, images, seed)
