"""A model folder as a diffusers pipeline: pruned students run where Stable Diffusion and Stable Diffusion XL run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bilevel_fast.base.errors import UserError, require
from bilevel_fast.base.files import read_json
from bilevel_fast.models.autoencoder import KLAutoencoder
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.text_encoder import ClipTextEncoder
from bilevel_fast.models.unet import UNet
from bilevel_fast.models.weights import load_pretrained

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline


class PipelineUNet(nn.Module):
    """Our UNet with the signature by which a `StableDiffusionPipeline`, or that of XL, calls its
    `UNet2DConditionModel`."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        diffusers = require("diffusers", "sd")
        self.unet = unet
        self.config = diffusers.configuration_utils.FrozenDict(unet.config.to_dict() | {"time_cond_proj_dim": None})

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        **conditions: Any,
    ) -> Any:
        """Predict.

        Args:
            sample: (B, C, H, W) noisy latents.
            timestep: One for all, or (B,).
            encoder_hidden_states: (B, L, D) text states.
            return_dict: A `UNet2DConditionOutput` or a tuple of one.
            conditions: Of other networks (adapters, control); all must be None.

        Raises:
            UserError: A condition came that this UNet has no input for.
        """
        given = [name for name, value in conditions.items() if value is not None]
        if given:
            raise UserError(f"a pruned UNet takes no {', '.join(given)}")
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        out = self.unet(sample, t, encoder_hidden_states).out
        if not return_dict:
            return (out,)
        diffusers = require("diffusers", "sd")
        return diffusers.models.unets.unet_2d_condition.UNet2DConditionOutput(sample=out)


def load_pipeline(path: Path | str, dtype: torch.dtype = torch.float32) -> "StableDiffusionPipeline":
    """A working diffusers pipeline of a dense or pruned Stable Diffusion, on the CPU; `.to("cuda")` moves it.

    A safety checker that the folder may hold is not loaded.

    Args:
        path: A model folder.
        dtype: Of all weights.

    Raises:
        UserError: As `load_folder`; or the folder holds a mini world's model, which diffusers has no pipeline for.
    """
    diffusers = require("diffusers", "sd")
    path = Path(path)
    folder = load_folder(path, dtype=dtype)
    if not isinstance(folder.text_encoder, ClipTextEncoder) or not isinstance(folder.vae, KLAutoencoder):
        raise UserError(
            f"{path} holds a model of the mini world, which is no Stable Diffusion; "
            f"draw with it by: python -m bilevel_fast.sample --model {path}"
        )
    scheduler_class = read_json(path / "model_index.json")["scheduler"][1]
    return diffusers.StableDiffusionPipeline(
        vae=folder.vae.model,
        text_encoder=folder.text_encoder.model,
        tokenizer=folder.text_encoder.tokenizer,
        unet=PipelineUNet(folder.unet()).to(dtype).eval(),
        scheduler=load_pretrained(getattr(diffusers, scheduler_class), path / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
