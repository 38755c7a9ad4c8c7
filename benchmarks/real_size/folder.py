"""Stable Diffusion 2.1 as it is published, at real size, with random weights; and a few pictures to train on.

    python -m benchmarks.real_size.folder sd21             1.3 billion parameters, 2.6 GB
    python -m benchmarks.real_size.folder sd21 --tiny      the same layout in 4 MB, for tests

Layout, names, shapes and scheduler are those of the published folder of 768 pixels in half precision
(`*.fp16.safetensors`), which is what most users download: half the disk of fp32, and every command widens what it
computes with. The vocabulary is the real one, which open_clip brings. diffusers and transformers make the networks on
the meta device and say what they hold; one component is in memory at a time, in fp16.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor, nn

from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError, require
from bilevel_fast.base.files import replacing, write_json
from bilevel_fast.base.tensors import write_tensors

TOKENS = 49408
"""Of CLIP: 256 bytes, the same at the end of a word, the merges, begin and end."""
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
CAPTIONS = ("a red star in a garden", "a blue house by the sea", "a photo of an old ship", "two children and a dog")
"""Of the pictures."""
PROMPTS = ("a red star", "a house in a garden")
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclass(frozen=True)
class Size:
    """The widths of the three networks; their depth and their layout are always those of Stable Diffusion 2.1."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]


REAL = Size(
    unet={
        "sample_size": 96,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
    },
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 768},
    text={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
)
TINY = Size(
    unet={
        "sample_size": 8,
        "block_out_channels": (16, 32, 32, 32),
        "attention_head_dim": (2, 4, 4, 4),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    },
    vae={"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "sample_size": 64},
    text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
)


@dataclass(frozen=True)
class Settings:
    """Settings of the folder."""

    out: Annotated[Path, tyro.conf.Positional]
    """The model folder; must be new. Beside it come `images/` and `prompts.txt`."""
    tiny: bool = False
    """Small widths."""


def networks(size: Size) -> dict[str, tuple[Any, str]]:
    """UNet, VAE and text encoder by the name of their folder, on the meta device, and the stem of their files.

    Raises:
        UserError: diffusers or transformers is not installed.
    """
    diffusers, transformers = require("diffusers", "sd"), require("transformers", "sd")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(use_linear_projection=True, **size.unet)
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4, scaling_factor=0.18215, **size.vae,
        )  # fmt: skip
        text = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=TOKENS, hidden_act="gelu", projection_dim=512, bos_token_id=0, eos_token_id=2,
                pad_token_id=1, **size.text,
            )
        )  # fmt: skip
    stem = "diffusion_pytorch_model"
    return {"unet": (unet, stem), "vae": (vae, stem), "text_encoder": (text, "model")}


def make(path: Path, size: Size) -> dict[str, int]:
    """Write the model folder; the parameters of each network by name. The same weights every time.

    Raises:
        UserError: `path` exists, or diffusers, transformers or open_clip is not installed.
    """
    if path.exists():
        raise UserError(f"{path} exists already; delete it or choose another folder")
    found = networks(size)
    for number, (name, (network, stem)) in enumerate(found.items()):
        if name == "text_encoder":
            network.config.save_pretrained(path / name)
        else:
            network.save_config(path / name)
        weights = dict(drawn(network, torch.Generator().manual_seed(number)))
        if name == "text_encoder":  # as published: an older transformers wrote it
            weights = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in weights.items()}
            weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        with replacing(path / name / f"{stem}.fp16.safetensors") as file:
            write_tensors(file, weights, metadata={"format": "pt"})
    write_vocabulary(path / "tokenizer")
    require("diffusers", "sd").DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction",
    ).save_pretrained(path / "scheduler")  # fmt: skip
    write_json(path / "model_index.json", INDEX)
    return {name: sum(p.numel() for p in network.parameters()) for name, (network, _) in found.items()}


def drawn(network: nn.Module, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a network on the meta device as fp16: matrices keep the variance of what goes through them,
    vectors are those of a fresh layer."""
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            values = torch.empty(parameter.shape).normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
        else:
            values = torch.full(parameter.shape, float(name.endswith("weight")))
        yield name, values.half()


def write_vocabulary(path: Path) -> None:
    """Write CLIP's `vocab.json` and `merges.txt`, as transformers reads them, from the file that open_clip brings."""
    tokenizer = require("open_clip.tokenizer", "metrics").SimpleTokenizer()
    ranks = tokenizer.encoder
    assert len(ranks) == TOKENS
    # open_clip spells begin and end otherwise; they are the last two
    names = {TOKENS - 2: BEGIN, TOKENS - 1: END}
    path.mkdir(parents=True)
    vocabulary = {names.get(rank, piece): rank for piece, rank in ranks.items()}
    (path / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"model_max_length": 77, "pad_token": "!", "bos_token": BEGIN, "eos_token": END, "unk_token": END}
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", **settings})


def draw_pictures(folder: Path, side: int) -> None:
    """A JPEG of smooth colours for each caption, and the `metadata.jsonl` that `prepare folder` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, caption in enumerate(CAPTIONS):
        coarse = np.random.default_rng(number).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.jpg", quality=90)
        lines.append(json.dumps({"file_name": f"{number}.jpg", "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.real_size.folder", __doc__)
    found = make(settings.out, TINY if settings.tiny else REAL)
    draw_pictures(settings.out.parent / "images", 96 if settings.tiny else 640)
    (settings.out.parent / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    for name, count in found.items():
        print(f"{name:<14}{count:>15,} parameters")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
