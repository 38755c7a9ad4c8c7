"""What a folder or a file is that is no model for here: it is named before some field of a config or a name is.

Told apart by what the UNet reads and by the names of tensors, never by the name of a file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import open_safetensors, read_json
from bilevel_fast.models.weights import PICKLES

SUPPORTED = "supported are text-to-image models of Stable Diffusion 1.x, 2.x and XL"
CONVERT = "python -m bilevel_fast.convert"

_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "a model that edits pictures, such as InstructPix2Pix",
    9: "an inpainting model",
}
"""By what the UNet reads; it writes 4."""
_LORA = (
    "a LoRA; merge it into its model with diffusers and peft: pipe.load_lora_weights(LORA), pipe.fuse_lora(), "
    "pipe.unload_lora_weights(), pipe.save_pretrained(FOLDER)"
)
_EMBEDDING = (
    "the embeddings of a textual inversion; put them into their model with diffusers: "
    "pipe.load_textual_inversion(FILE), pipe.save_pretrained(FOLDER)"
)
_XL = (
    "a checkpoint of Stable Diffusion XL; write its folder with diffusers: "
    "StableDiffusionXLPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
)
_CONTROLNET = "a ControlNet"
_CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
_PARTS = {
    "adapter_config.json": _LORA,
    "pytorch_lora_weights.safetensors": _LORA,
    "learned_embeds.safetensors": _EMBEDDING,
}
"""Files that a folder has which is no model."""


def refuse_others(path: Path) -> None:
    """Refuse a folder that holds something else than a text-to-image model.

    Nothing is said of what is damaged or missing: the readers of each part do that.

    Raises:
        UserError: Says what it is.
    """
    if not (path / "model_index.json").is_file():
        for name, kind in _PARTS.items():
            if (path / name).is_file():
                raise UserError(f"{path} is {kind}")
        alone = read_json(path / "config.json").get("_class_name") if (path / "config.json").is_file() else None
        if isinstance(alone, str):
            kind = _CONTROLNET if alone.startswith("ControlNet") else f"a {alone} alone"
            raise UserError(f"{path} is {kind}; wanted the folder around it, with model_index.json")
        return
    index = read_json(path / "model_index.json")
    config = read_json(path / "unet/config.json") if (path / "unet/config.json").is_file() else {}
    if (kind := _of_index(index) or _of_unet(config) or _of_scheduler(path, index)) is not None:
        raise UserError(f"{path} is {kind}; {SUPPORTED}")


def is_xl(index: Mapping[str, Any]) -> bool:
    """Whether a `model_index.json` is of Stable Diffusion XL or of one of its relatives."""
    name = str(index.get("_class_name"))
    return name.startswith("StableDiffusionXL") or {"text_encoder_2", "unet"} <= index.keys()


def _of_index(index: Mapping[str, Any]) -> str | None:
    scheduler, name = index.get("scheduler"), index.get("_class_name")
    if isinstance(name, str) and "Inpaint" in name:
        return f"an inpainting model ({name})"
    if is_xl(index) and (index.get("requires_aesthetics_score") or index.get("text_encoder") == [None, None]):
        return "the refiner of Stable Diffusion XL"
    if isinstance(scheduler, list) and "LCMScheduler" in scheduler:
        return "a latent consistency model (LCM), which is distilled to few steps"
    if "transformer" in index and "unet" not in index:
        return "a transformer such as Stable Diffusion 3 or Flux, without a UNet"
    return None


def _of_scheduler(path: Path, index: Mapping[str, Any]) -> str | None:
    file, scheduler = path / "scheduler/scheduler_config.json", index.get("scheduler")
    ancestral = isinstance(scheduler, list) and "EulerAncestralDiscreteScheduler" in scheduler
    if is_xl(index) and ancestral and file.is_file() and read_json(file).get("timestep_spacing") == "trailing":
        return "a turbo model of Stable Diffusion XL, which is distilled to few steps"
    return None


def _of_unet(config: Mapping[str, Any]) -> str | None:
    reads = config.get("in_channels")
    if config.get("time_cond_proj_dim") is not None:
        return "a latent consistency model (LCM), which is distilled to few steps"
    if config.get("class_embed_type") == "projection":
        return "an unCLIP model, which draws from a picture's embedding"
    if config.get("addition_embed_type") == "text_time" and config.get("cross_attention_dim") == 1280:
        return "the refiner of Stable Diffusion XL"
    if type(reads) is int and reads in _CHANNELS and config.get("out_channels") == 4:
        return f"{_CHANNELS[reads]} (its UNet reads {reads} channels)"
    return None


def refuse_file(path: Path) -> None:
    """Refuse what is no checkpoint of Stable Diffusion in one file: what `convert_file` takes passes.

    Raises:
        UserError: Says what it is, or that it is damaged.
    """
    if any(path.match(pattern) for pattern in PICKLES):
        raise UserError(
            f"{path} is a pickle, and reading one can run code; write its tensors to a .safetensors file "
            f"(docs/formats.md has the command), then: {CONVERT} --file FILE.safetensors --config-from FOLDER --out OUT"
        )
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is a file; wanted a folder in the diffusers layout, or a checkpoint in .safetensors")
    try:
        file = open_safetensors(path)
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} holds a tensor that cannot be read: {error}") from error
    if (kind := _of_tensors(shapes)) is not None:
        said = "" if ";" in kind else f"; {SUPPORTED}"
        raise UserError(f"{path} is {kind}{said}")


def _of_tensors(shapes: Mapping[str, Sequence[int]]) -> str | None:
    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in shapes)

    if has("control_model.", "input_hint_block.", "controlnet_"):
        return _CONTROLNET
    if has("lora_") or any(".lora_" in name or ".lora." in name for name in shapes):
        return _LORA
    if _CONV_IN in shapes:
        if has("conditioner.embedders.1."):
            return _XL
        if has("conditioner."):
            return "the refiner of Stable Diffusion XL"
        if has("model.diffusion_model.label_emb."):
            return "an unCLIP model or an upscaler, whose UNet reads more than text"
        reads = shapes[_CONV_IN][1] if len(shapes[_CONV_IN]) == 4 else 0
        return f"{_CHANNELS[reads]} (its UNet reads {reads} channels)" if reads in _CHANNELS else None
    if has("double_blocks.", "joint_blocks.", "model.diffusion_model."):
        return "a transformer such as Stable Diffusion 3 or Flux, without a UNet"
    if 1 <= len(shapes) <= 2 and all(len(shape) <= 2 for shape in shapes.values()):
        return _EMBEDDING
    if has("down_blocks.", "text_model.", "encoder.", "first_stage_model.", "cond_stage_model."):
        return "one component of a model; wanted the folder around it, or a checkpoint with all of them"
    return "no checkpoint of a model that is known here"
