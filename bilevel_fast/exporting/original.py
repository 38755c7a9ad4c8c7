"""A model as a checkpoint in one file, in the original layout: the inverse of what `models.single_file` reads.

    model.diffusion_model.*                 the UNet
    first_stage_model.*                     the VAE
    cond_stage_model.transformer.*          the text encoder of 1.x, under the names of transformers
    cond_stage_model.model.*                that of 2.x, under OpenCLIP's; the layer that 2.x does not ask is not there
    conditioner.embedders.0.transformer.*   both of XL: the first one under the names of transformers,
    conditioner.embedders.1.model.*         the second one under OpenCLIP's

What diffusers makes of the file is compared with what it was made of, to the bit, before it is written.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError, require
from bilevel_fast.base.files import read_json
from bilevel_fast.exporting.plain import plain
from bilevel_fast.models.folder import UNET_STEM, load_unet
from bilevel_fast.models.unet_config import UNetConfig
from bilevel_fast.models.weights import mapped_weights

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
CLIP_XL, OPEN_CLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

_ENDS = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_LAYER = {
    "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
_VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip
"""The second line has names of diffusers before 0.15, which published VAEs still have."""


def original(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a model under their original names, and the `unet/config.json` that they are read with.

    Args:
        folder: A model folder of Stable Diffusion 1.x, 2.x or XL.

    Raises:
        UserError: The layout has no place for its structure, whose site is named; a weight has a name that the layout
            does not know; or diffusers would not read from the file what was put into it.
    """
    student, config = load_unet(folder, mapped=True), read_json(folder / "unet" / "config.json")
    try:
        smaller = plain(student.structure)
    except UserError as error:
        raise UserError(f"{folder}: the original layout has no place for this structure: {error}") from error
    if not isinstance(smaller.config.layers_per_block, int):
        raise UserError(
            f"{folder}: the original layout has no place for this structure: sites down_blocks.* are left with "
            f"{', '.join(map(str, smaller.config.layers_per_block))} ResNets, wanted the same number in each"
        )
    config = {k: v for k, v in smaller.fields(config).items() if k != "pruned"} | {
        "_class_name": "UNet2DConditionModel"
    }
    unet, vae = smaller.renamed(student.state_dict()), mapped_weights(folder / "vae", UNET_STEM)
    tensors = {UNET + _unet_name(name, smaller.config): tensor for name, tensor in unet.items()}
    tensors |= {VAE + _vae_name(folder, name, vae): _as_convolution(name, tensor) for name, tensor in vae.items()}
    texts = {
        part: _with_prefix(mapped_weights(folder / part, "model"))
        for part in ("text_encoder", "text_encoder_2")
        if (folder / part).is_dir()
    }
    for part, prefix in _prefixes(smaller.config).items():
        named = _open_clip(folder / part, texts[part]) if prefix in (OPEN_CLIP, OPEN_CLIP_XL) else texts[part]
        tensors |= {prefix + name: tensor for name, tensor in named.items()}
    _check(folder, tensors, {"unet": unet, "vae": vae, **texts}, config, smaller.config)
    return tensors, config


def _prefixes(config: UNetConfig) -> dict[str, str]:
    """Of the text encoders. 2.x came with linear projections and OpenCLIP, 1.x has neither."""
    if config.pooled_dim:
        return {"text_encoder": CLIP_XL, "text_encoder_2": OPEN_CLIP_XL}
    return {"text_encoder": OPEN_CLIP if config.use_linear_projection else CLIP}


def _unet_name(name: str, config: UNetConfig) -> str:
    for ours, theirs in _ENDS.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    match = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", name)
    assert match, name
    where, block, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        part, _, end = rest.partition(".")
        rest = f"{_RESNET[part]}.{end}"
    attends, each = kind == "attentions", config.layers(0) + 1
    if where is None:
        return f"middle_block.{1 if attends else 2 * number}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * each}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        behind = 1 + config.up_block_types[block].startswith("CrossAttn")
        return f"output_blocks.{block * each + each - 1}.{behind}.{rest}"
    at = f"input_blocks.{1 + block * each + number}" if where == "down" else f"output_blocks.{block * each + number}"
    return f"{at}.{int(attends)}.{rest}"


def _vae_name(folder: Path, name: str, names: Mapping[str, Tensor]) -> str:
    """In the original layout levels count from the outermost one, also on the way up."""
    levels = 1 + max((int(each.split(".")[2]) for each in names if each.startswith("decoder.up_blocks.")), default=0)
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        if match[2] in _VAE_ATTENTION:
            return f"{match[1]}.mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"
    elif match := re.fullmatch(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", name):
        name = f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    elif match := re.fullmatch(r"encoder\.down_blocks\.(\d+)\.(resnets|downsamplers)\.(\d+)\.(.+)", name):
        part = f"block.{match[3]}" if match[2] == "resnets" else "downsample"
        name = f"encoder.down.{match[1]}.{part}.{match[4]}"
    elif match := re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", name):
        part = f"block.{match[3]}" if match[2] == "resnets" else "upsample"
        name = f"decoder.up.{levels - 1 - int(match[1])}.{part}.{match[4]}"
    elif not re.fullmatch(r"((encoder|decoder)\.(conv_in|conv_norm_out|conv_out)|(post_)?quant_conv)\.\w+", name):
        raise UserError(f"{folder / 'vae'}: {name} has no name in the original layout")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    """The projections of a VAE's attention are 1x1 convolutions in the original layout."""
    return tensor[:, :, None, None] if ".attentions." in name and tensor.dim() == 2 else tensor


def _with_prefix(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As names were before transformers 5.6, and still are where a projection follows."""
    return {name if name.startswith("text_") else f"text_model.{name}": tensor for name, tensor in text.items()}


def _open_clip(folder: Path, text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in text.items():
        if match := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            layer, part, end = f"transformer.resblocks.{match[1]}", match[2], match[3]
            if part in _LAYER:
                found[f"{layer}.{_LAYER[part]}.{end}"] = tensor
            else:
                parts.setdefault(f"{layer}.attn.in_proj_{end}", {})[part] = tensor
        elif match := re.fullmatch(r"text_model\.final_layer_norm\.(weight|bias)", name):
            found[f"ln_final.{match[1]}"] = tensor
        elif name == "text_model.embeddings.token_embedding.weight":
            found["token_embedding.weight"] = tensor
        elif name == "text_model.embeddings.position_embedding.weight":
            found["positional_embedding"] = tensor
        elif name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif not name.endswith(".position_ids"):
            raise UserError(f"{folder}: {name} has no name in the original layout")
    for name, three in parts.items():
        found[name] = torch.cat([three[f"self_attn.{one}_proj"] for one in "qkv"])
    return found


def _check(
    folder: Path, tensors: Mapping[str, Tensor], wanted: Mapping[str, Any], config: Mapping[str, Any], read: UNetConfig
) -> None:
    """Refuse a file of which diffusers would read something else.

    Raises:
        UserError: Names the component and the first weight that differs.
    """
    library = require("diffusers.loaders.single_file_utils", "sd")
    found = {
        "unet": library.convert_ldm_unet_checkpoint(tensors, {"layers_per_block": 2, **config}),
        "vae": library.convert_ldm_vae_checkpoint(tensors, read_json(folder / "vae" / "config.json")),
    }
    for part, prefix in _prefixes(read).items():
        if prefix in (OPEN_CLIP, OPEN_CLIP_XL):
            width = read_json(folder / part / "config.json").get("hidden_size")
            like = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
            found[part] = library.convert_open_clip_checkpoint(like, dict(tensors), prefix)
        else:
            found[part] = {name[len(prefix) :]: each for name, each in tensors.items() if name.startswith(prefix)}
    for part, came in found.items():
        expected = {_now(name): each for name, each in wanted[part].items() if not name.endswith(".position_ids")}
        came = {_now(name): each for name, each in came.items() if not name.endswith(".position_ids")}
        for name in sorted(expected.keys() | came.keys()):
            one, other = expected.get(name), came.get(name)
            if one is None or other is None or not torch.equal(one.flatten(), other.flatten()):
                raise UserError(f"{folder / part}: diffusers would read another {name} from the original layout")


def _now(name: str) -> str:
    """The name that diffusers gives a weight of a VAE today."""
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    return name
