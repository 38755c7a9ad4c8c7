"""A small random Stable Diffusion XL in the diffusers layout, made by diffusers and transformers themselves.

Layout, class names and the fields of every config are those of the real base model; only widths, the number of
transformer blocks and the embedding of size numbers are small.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sd_folder import _tokenizer

WIDTHS, PROJECTED, SIDE = (24, 40), 40, 64
"""Of both towers' states, of the pooled state, and of a picture in pixels."""


def make_sdxl_folder(path: Path, *, seed: int = 0, depths: tuple[int, ...] = (1, 2, 10)) -> Path:
    """Write a model folder and return its path; the same seed writes the same weights.

    Args:
        depths: Transformer blocks of each level; the outermost one has no Transformer. (1, 2, 10) in the real model.
    """
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=SIDE // 8,
            block_out_channels=(16, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=depths,
            attention_head_dim=(2, 4, 4),
            cross_attention_dim=sum(WIDTHS),
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=PROJECTED + 6 * 8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=SIDE,
            scaling_factor=0.13025,
            force_upcast=True,
        )
        words = [_tokenizer(path / f"tokenizer{end}", pad) for end, pad in (("", "<|endoftext|>"), ("_2", "!"))]
        towers = [_tower(number, tokenizer) for number, tokenizer in enumerate(words)]
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=towers[0],
        text_encoder_2=towers[1],
        tokenizer=words[0],
        tokenizer_2=words[1],
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            prediction_type="epsilon",
            timestep_spacing="leading",
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.save_pretrained(path, safe_serialization=True)
    for end in ("", "_2"):
        _as_published(path, end)
    return path


def _tower(number: int, tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTHS[number],
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act=("quick_gelu", "gelu")[number],
        projection_dim=PROJECTED,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModel, CLIPTextModelWithProjection)[number](config)


def _as_published(path: Path, end: str) -> None:
    """Undo what newer libraries write differently from the published folder."""
    (path / f"tokenizer{end}" / "tokenizer.json").unlink()
    weights = path / f"text_encoder{end}" / "model.safetensors"
    known = ("text_model.", "text_projection.")
    tensors = {
        name if name.startswith(known) else f"text_model.{name}": tensor for name, tensor in load_file(weights).items()
    }
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, weights, metadata={"format": "pt"})
