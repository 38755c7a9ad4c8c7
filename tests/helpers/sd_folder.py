"""A small random Stable Diffusion 2.1 in the diffusers layout, made by diffusers and transformers themselves.

The layout, the class names, the scheduler settings and the tokenizer files are those of the real model; only widths are
small, so that the code that reads a real folder runs here without its weights.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WORDS = ("a", "red", "blue", "star", "photo", "house", "of", "in", "the", "style", "by", "monet")
"""Each becomes one token; every other word is spelled in bytes."""

TEXT_WIDTH = 32


def make_sd_folder(
    path: Path,
    *,
    seed: int = 0,
    widths: tuple[int, ...] = (16, 32, 32, 32),
    heads: tuple[int, ...] = (2, 4, 4, 4),
    groups: int = 8,
    sample_size: int = 8,
    prediction_type: str = "v_prediction",
    scheduler: str = "PNDMScheduler",
    linear: bool = True,
    text_layers: int = 2,
    layers: int = 2,
) -> Path:
    """Write a model folder and return its path; the same seed writes the same weights.

    Stable Diffusion 1.5 is not `linear`, and Stable Diffusion 2.1 has 23 `text_layers`.
    """
    import diffusers
    from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=sample_size,
            block_out_channels=widths,
            layers_per_block=layers,
            attention_head_dim=heads,
            cross_attention_dim=TEXT_WIDTH,
            norm_num_groups=groups,
            use_linear_projection=linear,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=8 * sample_size,
            scaling_factor=0.18215,
        )
        tokenizer = _tokenizer(path / "tokenizer")
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=64,
                num_hidden_layers=text_layers,
                num_attention_heads=4,
                hidden_act="gelu",
                pad_token_id=1,
                **ends,
            )
        )
    steps = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
    }
    match scheduler:
        case "PNDMScheduler":
            schedule = PNDMScheduler(skip_prk_steps=True, **steps)
        case "DDIMScheduler":
            schedule = DDIMScheduler(clip_sample=False, **steps)
        case _:
            schedule = getattr(diffusers, scheduler).from_config({**steps, "timestep_spacing": "leading"})
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path, safe_serialization=True)
    _as_published(path)
    return path


def _as_published(path: Path) -> None:
    """Undo what newer libraries write differently from the published Stable Diffusion 2.1 folder."""
    (path / "tokenizer" / "tokenizer.json").unlink()
    weights = path / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, weights, metadata={"format": "pt"})


def _tokenizer(path: Path, pad: str = "!"):
    """A CLIP byte-pair tokenizer read back from the two files that define one: `vocab.json` and `merges.txt`."""
    from transformers import CLIPTokenizer

    merges = list(dict.fromkeys(pair for word in WORDS for pair in _merges(word)))
    letters = _byte_alphabet()
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {
        piece: index for index, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"model_max_length": 77, "pad_token": pad, "unk_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(path)


def _merges(word: str) -> list[tuple[str, str]]:
    """The merges that build a word from its letters, left to right; its last letter carries the end-of-word mark."""
    parts = [*word[:-1], word[-1] + "</w>"]
    pairs = []
    while len(parts) > 1:
        pairs.append((parts[0], parts[1]))
        parts[:2] = ["".join(parts[:2])]
    return pairs


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes: the printable Latin-1 characters, then those from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in printable] + [chr(256 + offset) for offset in range(256 - len(printable))]
