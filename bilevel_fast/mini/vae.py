"""The mini world's "VAE": pixel unshuffle, which is exact, with latents shifted and scaled to unit variance."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel_fast.errors import UserError
from bilevel_fast.files import read_json, write_json

_LOGVAR = -30.0  # a standard deviation of 3e-7: sampling the posterior gives its mean


@dataclass(frozen=True)
class PixelUnshuffleVAE:
    """Images (B, 3, H, W) in [-1, 1] to latents (B, 12, H/2, W/2) and back, with the interface of a real VAE.

    Latents are what the UNet sees: `(z - shift_factor) * scaling_factor`, where z are the unshuffled pixels.
    """

    scaling_factor: float = 2.13
    shift_factor: float = 0.66
    """With the scaling, measured on the drawn world: latents have mean 0 and standard deviation 1."""
    block: int = 2
    """Side of the square of pixels that becomes one latent position."""

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return 3 * self.block**2

    def moments(self, images: Tensor) -> Tensor:
        """Posterior mean and log variance of scaled latents: (B, 3, H, W) to (B, 2 * channels, H/2, W/2)."""
        mean = (F.pixel_unshuffle(images, self.block) - self.shift_factor) * self.scaling_factor
        return torch.cat([mean, torch.full_like(mean, _LOGVAR)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) of scaled latents (B, channels, H/2, W/2), clamped to [-1, 1]."""
        return F.pixel_shuffle(latents / self.scaling_factor + self.shift_factor, self.block).clamp(-1, 1)

    def save(self, folder: Path) -> None:
        """Write `folder/config.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"_class_name": type(self).__name__, **asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> "PixelUnshuffleVAE":
        """Read what `save` wrote.

        Raises:
            UserError: `folder/config.json` is missing or describes something else.
        """
        path = folder / "config.json"
        config = read_json(path)
        if config.get("_class_name") != cls.__name__:
            raise UserError(f"{path}: _class_name is {config.get('_class_name')!r}, wanted {cls.__name__!r}")
        try:
            return cls(float(config["scaling_factor"]), float(config["shift_factor"]), int(config["block"]))
        except KeyError as error:
            raise UserError(f"{path}: {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}: {error}") from error
