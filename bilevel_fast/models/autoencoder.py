"""Images to latents and back: what every autoencoder offers, and the VAE of Stable Diffusion.

Latents are always *scaled*: multiplied by the VAE's scaling factor, as the UNet sees them.

Shape legend: B images, H W image size, C latent channels, h w latent size.
"""

import math
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError, require
from bilevel_fast.base.files import read_json
from bilevel_fast.base.limits import BLOCK_LAYERS, CHANNELS, SIDE
from bilevel_fast.models.weights import check_counts, check_report, find_weights, load_pretrained, mapped_weights


class Autoencoder(Protocol):
    """A frozen autoencoder."""

    @property
    def channels(self) -> int:
        """C."""
        ...

    def moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance (B, 2C, h, w) fp32 of the scaled latents of images (B, 3, H, W) in [-1, 1]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) fp32 in [-1, 1] of scaled latents (B, C, h, w)."""
        ...


_MOST = {
    **dict.fromkeys(
        ("in_channels", "out_channels", "latent_channels", "block_out_channels", "norm_num_groups"), CHANNELS
    ),
    "layers_per_block": BLOCK_LAYERS,
    "sample_size": SIDE,
}


def _check_memory(diffusers: Any, folder: Path, config: dict[str, Any], size: int) -> None:
    """Refuse a config that asks for far more memory than the weights have bytes, before any is made room for.

    Raises:
        UserError: It does, or diffusers can make nothing of it.
    """
    try:
        with torch.device("meta"):
            wanted = sum(p.numel() for p in diffusers.AutoencoderKL.from_config(config).parameters())
    except Exception as error:  # a bad config makes diffusers raise anything
        raise UserError(f"{folder}: {' '.join(str(error).split())}") from error
    if wanted > size:
        raise UserError(f"{folder}: config.json describes {wanted} weights, the files have {size} bytes")


class KLAutoencoder:
    """`AutoencoderKL` of diffusers.

    It estimates a normal posterior of z; with scaled latents x = s z the mean is s times, and the log-variance
    2 ln s more than, that of z (arXiv:2112.10752, section G).
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    def load(
        cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "KLAutoencoder":
        """Read the `vae/` of a model folder; the network is never asked.

        Raises:
            UserError: diffusers is not installed, or a file is missing, broken or does not fit the config.
        """
        diffusers = require("diffusers", "sd")
        config = read_json(folder / "config.json")
        for field in ("shift_factor", "latents_mean", "latents_std"):
            if config.get(field) is not None:
                raise UserError(f"{folder / 'config.json'}: {field}={config[field]!r} is not supported, wanted null")
        check_counts(folder, config, _MOST)
        found = find_weights(folder, "diffusion_pytorch_model")
        _check_memory(diffusers, folder, config, sum(file.stat().st_size for file in found.files))
        mapped_weights(folder, "diffusion_pytorch_model")  # diffusers takes numbers that are none
        model, report = load_pretrained(
            diffusers.AutoencoderKL,
            folder,
            torch_dtype=dtype,
            variant=found.variant,
            use_safetensors=True,
            output_loading_info=True,
            low_cpu_mem_usage=False,  # True wants accelerate, and says so on every terminal without it
        )
        check_report(folder, report)
        model.to(device).eval().requires_grad_(False)
        if torch.device(device).type != "cpu":
            model.to(memory_format=torch.channels_last)  # what a GPU's convolutions want, and else copy to
        return cls(model)

    @property
    def channels(self) -> int:
        return self.model.config.latent_channels

    @property
    def scaling_factor(self) -> float:
        return self.model.config.scaling_factor

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        posterior = self.model.encode(images.to(self.model.device, self.model.dtype)).latent_dist
        mean = posterior.mean.float() * self.scaling_factor
        return torch.cat([mean, posterior.logvar.float() + 2 * math.log(self.scaling_factor)], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        unscaled = latents.to(self.model.device, torch.float32) / self.scaling_factor
        return self.model.decode(unscaled.to(self.model.dtype)).sample.float().clamp(-1, 1)
