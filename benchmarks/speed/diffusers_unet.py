"""diffusers' own UNet, cut down to a pruned student: what the peers of `benchmarks.speed.peers` run.

The surgery is that of a released pruned model: narrower convolutions and linear layers, a second GroupNorm of as many
groups as were kept, fewer heads, and where a site was dropped a module that hands its input on. No mask, no padding;
keys and shapes are those of our own UNet's state dict.

Shape legend: B batch, C channels, H W latent size, L text tokens, D text width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_fast.base.errors import require
from bilevel_fast.models.architecture import Site, sites
from bilevel_fast.models.conditioning import SIZES, unpack
from bilevel_fast.models.structure import Structure

_ADDITION = ("addition_time_embed", "projection_class_embeddings_input")


class DroppedResNet(nn.Module):
    """Stands for a dropped ResNet: of an input that ends with a skip connection, only what comes before it."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return x[:, : self.channels]


class DroppedBlock(nn.Module):
    """Stands for a dropped transformer block."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class DroppedTransformer(nn.Module):
    """Stands for a dropped Transformer. Blocks ask for a tuple, as with `return_dict=False`."""

    def forward(self, x: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> tuple[Tensor]:
        return (x,)


def diffusers_unet(structure: Structure, state: Mapping[str, Tensor], *, shared: bool = False, **load: Any) -> Any:
    """A `diffusers.UNet2DConditionModel` of this structure, with copies of these weights, on their device.

    Args:
        structure: What is kept. Site and tensor names are diffusers'.
        state: `UNet(config, structure).state_dict()`; every key is wanted, and no other.
        shared: Take the weights themselves instead of copies.
        load: Further arguments of `Tensor.to` for all weights, such as `dtype` and `device`.

    Raises:
        RuntimeError: A key is missing, unknown, or of another shape.
        UserError: diffusers is not installed.
    """
    diffusers = require("diffusers", "sd")
    with torch.device("meta"):  # neither memory nor time for weights that are overwritten
        unet = diffusers.UNet2DConditionModel.from_config(structure.config.to_dict())
        for site in sites(structure.config):
            _cut(unet, site, structure)
    if not shared:
        unet.to_empty(device=next(iter(state.values())).device)
    unet.load_state_dict(dict(state), assign=shared)
    return nn.Module.to(unet, **load) if load else unet  # diffusers' own `to` warns of a cast that is meant


def _cut(unet: nn.Module, site: Site, structure: Structure) -> None:
    if site.within in structure.dropped:
        return  # it went with its Transformer
    if site.name in structure.dropped:
        siblings, _, index = site.name.rpartition(".")
        dropped = {"transformer": DroppedTransformer, "transformer_block": DroppedBlock}
        instead = DroppedResNet(site.out_channels) if site.kind == "resnet" else dropped[site.kind]()
        unet.get_submodule(siblings)[int(index)] = instead  # type: ignore[operator]  # a ModuleList
        return
    module: Any = unet.get_submodule(site.name)
    units = {width.name: structure.count(site, width) for width in site.widths}
    sizes = {width.name: units[width.name] * width.unit_size for width in site.widths}
    if site.kind == "resnet":
        inner, norm = sizes["groups"], module.norm2
        module.conv1 = nn.Conv2d(site.in_channels, inner, 3, padding=1)
        module.time_emb_proj = nn.Linear(module.time_emb_proj.in_features, inner)
        module.norm2 = nn.GroupNorm(units["groups"], inner, norm.eps)
        module.conv2 = nn.Conv2d(inner, site.out_channels, 3, padding=1)
        return
    if site.transformer_block is None:
        return
    block: Any = unet.get_submodule(site.transformer_block)
    for name in ("attn1", "attn2"):
        attention, inner = getattr(block, name), sizes[name]
        attention.heads = units[name]
        attention.inner_dim = attention.inner_kv_dim = inner
        for projection in ("to_q", "to_k", "to_v"):
            width = getattr(attention, projection).in_features
            setattr(attention, projection, nn.Linear(width, inner, bias=False))
        attention.to_out[0] = nn.Linear(inner, site.out_channels)
    geglu, _, out = block.ff.net
    geglu.proj = nn.Linear(geglu.proj.in_features, 2 * sizes["ff"])
    block.ff.net[2] = nn.Linear(sizes["ff"], out.out_features)


class Hooked(nn.Module):
    """A diffusers UNet with a forward hook on every block: (sample, block outputs), which it does not return itself.

    Args:
        unet: A `UNet2DConditionModel`.
    """

    def __init__(self, unet: Any):
        super().__init__()
        self.unet = unet
        self.found: list[Tensor] = []
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            if block is not None:
                block.register_forward_hook(self._collect)

    def _collect(self, block: nn.Module, args: Any, out: Any) -> None:
        # down blocks return a tuple: what they hand on, and the skip connections
        self.found.append(out[0] if isinstance(out, tuple) else out)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x, t and text as `UNet.forward` takes them -> output (B, C, H, W) and the block outputs."""
        self.found, told = [], None
        if self.unet.config.addition_embed_type is not None:
            each, total = (self.unet.config[f"{name}_dim"] for name in _ADDITION)
            text, extra = unpack(text, total - SIZES * each)
            told = {"text_embeds": extra.pooled, "time_ids": extra.sizes}
        sample = self.unet(x, t, text, added_cond_kwargs=told, return_dict=False)[0]
        found, self.found = self.found, []  # nothing outlives the step but what the caller keeps
        return sample, found
