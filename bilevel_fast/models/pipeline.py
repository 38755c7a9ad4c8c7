"""A model folder as a diffusers pipeline: pruned students run where Stable Diffusion and Stable Diffusion XL run."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bilevel_fast.base.errors import UserError, require
from bilevel_fast.base.files import read_json
from bilevel_fast.models.autoencoder import KLAutoencoder
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.pipeline_unet import for_pipeline
from bilevel_fast.models.text_encoder import ClipTextEncoder
from bilevel_fast.models.text_encoder_xl import XlTextEncoder
from bilevel_fast.models.weights import load_pretrained

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline


def load_pipeline(
    path: Path | str, dtype: torch.dtype = torch.float32
) -> "StableDiffusionPipeline | StableDiffusionXLPipeline":
    """A working diffusers pipeline of a dense or pruned model, on the CPU; `.to("cuda")` moves it.

    Its class is that of the family, `StableDiffusionPipeline` or `StableDiffusionXLPipeline`. A safety checker that the
    folder may hold is not loaded. It takes schedulers, LoRAs (with peft) and textual inversions as theirs do, and
    `save_pretrained` writes a model folder: see `pipeline_unet`.

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
        "unet": for_pipeline(folder.unet().to(dtype)).eval(),
        "scheduler": load_pretrained(getattr(diffusers, scheduler_class), path / "scheduler"),
        "feature_extractor": None,
    }
    if isinstance(encoder, XlTextEncoder):
        pipeline = diffusers.StableDiffusionXLPipeline(
            text_encoder=encoder.first.model,
            text_encoder_2=encoder.second.model,
            tokenizer=encoder.first.tokenizer,
            tokenizer_2=encoder.second.tokenizer,
            force_zeros_for_empty_prompt=encoder.zeros,
            **parts,
        )
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            text_encoder=encoder.model,
            tokenizer=encoder.tokenizer,
            safety_checker=None,
            requires_safety_checker=False,
            **parts,
        )
    pipeline.register_to_config(unet=("diffusers", "UNet2DConditionModel"))  # as the folder says, and what is saved
    return pipeline
