"""A model folder as a checkpoint in one file, in the layout of the repositories that trained Stable Diffusion.

Names as ldm's `openaimodel` and `model`, and the CLIP of transformers (1.x) or OpenCLIP (2.x), give them.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
LEVELS, LAYERS = 4, 2

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_ENDS = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_LAYER = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def original(folder: Path, open_clip: bool) -> dict[str, Tensor]:
    """All tensors of a folder of `make_sd_folder`, under their names of old.

    Args:
        folder: With four levels of two layers.
        open_clip: Name the text encoder as OpenCLIP does, with the last layer that Stable Diffusion 2 leaves out.
    """
    tensors: dict[str, Tensor] = {}
    unet = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    for name, tensor in unet.items():
        tensors[UNET + _unet(name, unet)] = tensor
    for name, tensor in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        attention = re.search(r"attentions.0.to_.*weight", name)
        tensors[VAE + _vae(name)] = tensor[:, :, None, None] if attention else tensor
    text = load_file(folder / "text_encoder/model.safetensors")
    tensors |= _open_clip(text) if open_clip else {f"{TEXT}transformer.{name}": each for name, each in text.items()}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def averaged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As training saves it: the UNet's weights are the average's, and beside them are others."""
    ema = {f"model_ema.{name[6:].replace('.', '')}": each for name, each in tensors.items() if name.startswith(UNET)}
    raw = {name: each + 1 if name.startswith(UNET) else each for name, each in tensors.items()}
    return {**raw, **ema, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def _unet(name: str, names: dict[str, Tensor]) -> str:
    for ours, theirs in _ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs)
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d)\.)?(\w+)\.(\d)\.(.*)", name)
    assert match, name
    where, level, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    first, _, tail = rest.partition(".")
    rest = f"{_RESNET[first]}.{tail}" if kind == "resnets" else rest
    if where == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
    if where == "down":
        block = f"input_blocks.{1 + level * (LAYERS + 1) + number}"
        if kind == "downsamplers":
            return f"input_blocks.{(level + 1) * (LAYERS + 1)}.0.op.{rest.removeprefix('conv.')}"
        return f"{block}.{int(kind == 'attentions')}.{rest}"
    attends = any(each.startswith(f"up_blocks.{level}.attentions") for each in names)
    if kind == "upsamplers":
        return f"output_blocks.{level * (LAYERS + 1) + LAYERS}.{1 + attends}.{rest}"
    return f"output_blocks.{level * (LAYERS + 1) + number}.{int(kind == 'attentions')}.{rest}"


def _vae(name: str) -> str:
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{LEVELS - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{LEVELS - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
    name = re.sub(r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1", name)
    name = name.replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def _open_clip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix, found = f"{TEXT}model.", {}
    width = text["text_model.final_layer_norm.weight"].shape[0]
    for end in ("weight", "bias"):
        found[f"{prefix}ln_final.{end}"] = text[f"text_model.final_layer_norm.{end}"]
    found[f"{prefix}token_embedding.weight"] = text["text_model.embeddings.token_embedding.weight"]
    found[f"{prefix}positional_embedding"] = text["text_model.embeddings.position_embedding.weight"]
    count = 1 + max(int(name.split(".")[3]) for name in text if ".layers." in name)
    for layer in range(count + 1):
        ours, theirs = f"text_model.encoder.layers.{min(layer, count - 1)}", f"{prefix}transformer.resblocks.{layer}"
        for end in ("weight", "bias"):
            parts = [text[f"{ours}.self_attn.{one}_proj.{end}"] for one in "qkv"]
            found[f"{theirs}.attn.in_proj_{end}"] = torch.cat(parts)
            found |= {f"{theirs}.{new}.{end}": text[f"{ours}.{old}.{end}"].clone() for old, new in _LAYER.items()}
    return {**found, f"{prefix}text_projection": torch.eye(width), f"{prefix}logit_scale": torch.tensor(4.6)}
