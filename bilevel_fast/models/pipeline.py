"""A model folder as a diffusers pipeline: pruned students run where Stable Diffusion and Stable Diffusion XL run."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bilevel_fast.base.errors import UserError, require
from bilevel_fast.base.files import read_json
from bilevel_fast.models.autoencoder import KLAutoencoder
from bilevel_fast.models.conditioning import pack
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.text_encoder import ClipTextEncoder
from bilevel_fast.models.text_encoder_xl import XlTextEncoder
from bilevel_fast.models.unet import UNet
from bilevel_fast.models.weights import load_pretrained

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline


class PipelineUNet(nn.Module):
    """Our UNet with the signature by which a pipeline of diffusers calls its `UNet2DConditionModel`."""

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

    @property
    def add_embedding(self) -> nn.Module:
        """Of Stable Diffusion XL: its pipeline asks how wide the input is."""
        return self.unet.get_submodule("add_embedding")

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        return_dict: bool = True,
        **conditions: Any,
    ) -> Any:
        """Predict.

        Args:
            sample: (B, C, H, W) noisy latents.
            timestep: One for all, or (B,).
            encoder_hidden_states: (B, L, D) text states.
            added_cond_kwargs: Of Stable Diffusion XL: `text_embeds` (B, P) and `time_ids` (B, 6).
            return_dict: A `UNet2DConditionOutput` or a tuple of one.
            conditions: Of other networks (adapters, control); all must be None.

        Raises:
            UserError: A condition came that this UNet has no input for, or one is missing.
        """
        given = {name for name, value in conditions.items() if value is not None}
        wanted = {"text_embeds", "time_ids"} if self.unet.config.pooled_dim else set[str]()
        added = dict(added_cond_kwargs or {})
        given |= added.keys() - wanted if wanted else {"added_cond_kwargs"} if added else set()
        if given:
            raise UserError(f"a pruned UNet takes no {', '.join(sorted(given))}")
        if missing := wanted - added.keys():
            raise UserError(f"added_cond_kwargs lacks {', '.join(sorted(missing))}, which this UNet reads")
        text = encoder_hidden_states
        if wanted:
            text = pack(text, added["text_embeds"], added["time_ids"])
        t = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        out = self.unet(sample, t, text).out
        if not return_dict:
            return (out,)
        diffusers = require("diffusers", "sd")
        return diffusers.models.unets.unet_2d_condition.UNet2DConditionOutput(sample=out)


def load_pipeline(
    path: Path | str, dtype: torch.dtype = torch.float32
) -> "StableDiffusionPipeline | StableDiffusionXLPipeline":
    """A working diffusers pipeline of a dense or pruned model, on the CPU; `.to("cuda")` moves it.

    Its class is that of the family, `StableDiffusionPipeline` or `StableDiffusionXLPipeline`. A safety checker that the
    folder may hold is not loaded.

    Args:
        path: A model folder, or its id on the hub.
        dtype: Of all weights. In fp16 the pipeline of Stable Diffusion XL decodes in fp32 where its VAE's config says
            so.

    Raises:
        UserError: As `load_folder`; or the folder holds a mini world's model, which diffusers has no pipeline for.
    """
    diffusers = require("diffusers", "sd")
    folder = load_folder(path, dtype=dtype)
    path = folder.path
    encoder, vae = folder.text_encoder, folder.vae
    if not isinstance(encoder, ClipTextEncoder | XlTextEncoder) or not isinstance(vae, KLAutoencoder):
        raise UserError(
            f"{path} holds a model of the mini world, which is no Stable Diffusion; "
            f"draw with it by: python -m bilevel_fast.sample --model {path}"
        )
    scheduler_class = read_json(path / "model_index.json")["scheduler"][1]
    parts = {
        "vae": vae.model.to(dtype),
        "unet": PipelineUNet(folder.unet()).to(dtype).eval(),
        "scheduler": load_pretrained(getattr(diffusers, scheduler_class), path / "scheduler"),
        "feature_extractor": None,
    }
    if isinstance(encoder, XlTextEncoder):
        return diffusers.StableDiffusionXLPipeline(
            text_encoder=encoder.first.model,
            text_encoder_2=encoder.second.model,
            tokenizer=encoder.first.tokenizer,
            tokenizer_2=encoder.second.tokenizer,
            force_zeros_for_empty_prompt=encoder.zeros,
            **parts,
        )
    return diffusers.StableDiffusionPipeline(
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        safety_checker=None,
        requires_safety_checker=False,
        **parts,
    )
