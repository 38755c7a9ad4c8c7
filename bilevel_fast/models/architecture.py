"""What a Stable Diffusion UNet is made of: the sites that pruning may narrow or drop.

`sites` walks the network once and lists every ResNet and Transformer in the order of the APTP architecture
vector (arXiv:2406.12042): block by block (down, mid, up), first the ResNets of the block, then its Transformers.

    ResNet              1 width vector:   groups (GroupNorm groups of the inner channels)
    Transformer         3 width vectors:  attn1 (self-attention heads), attn2 (cross-attention heads), ff (FFN groups)

That is a Transformer of a single transformer block, as Stable Diffusion 1.x / 2.x has them. Those of XL have up to
ten. Each block is then a site of its own, behind that of its Transformer, which has no width vectors left: what remains
of it is a norm and two projections.

    transformer block   3 width vectors, as above
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from bilevel_fast.models.unet_config import UNetConfig as UNetConfig

SD21 = UNetConfig(
    sample_size=96,
    in_channels=4,
    out_channels=4,
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    num_heads=(5, 10, 20, 20),
    cross_attention_dim=1024,
)
MINI = UNetConfig(
    sample_size=16,
    in_channels=12,
    out_channels=12,
    block_out_channels=(48, 96, 96),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    num_heads=(3, 6, 6),
    cross_attention_dim=64,
    layers_per_block=1,
    norm_num_groups=16,
)


@dataclass(frozen=True)
class Cut:
    """One tensor that a width vector narrows: its name below the site, the axis, and how many copies of the
    units lie along that axis (2 for the value and gate halves of a GEGLU)."""

    tensor: str
    axis: int
    copies: int = 1


@dataclass(frozen=True)
class Width:
    """One width vector of a site: `units` units, each `unit_size` channels wide."""

    name: Literal["groups", "attn1", "attn2", "ff"]
    units: int
    unit_size: int
    cuts: tuple[Cut, ...]


@dataclass(frozen=True)
class Site:
    """A prunable module, named as in the state dict (`down_blocks.0.resnets.1`)."""

    name: str
    kind: Literal["resnet", "transformer", "transformer_block"]
    in_channels: int
    """Channels of the input, those of the skip connection included."""
    skip_channels: int
    """How many of `in_channels` come, concatenated last, from the skip connection; 0 outside up blocks."""
    out_channels: int
    stride: int
    """Latent size divided by the size this site works at."""
    widths: tuple[Width, ...]
    depth_bit: bool
    """The architecture vector has a bit that drops the site: the last of its kind in a down or up block, and every
    transformer block that is a site."""
    within: str = ""
    """Of a transformer block: the name of its Transformer. Where that is dropped, so is the block."""

    @property
    def droppable(self) -> bool:
        """Dropping leaves all shapes as they are."""
        return self.in_channels - self.skip_channels == self.out_channels

    @property
    def block(self) -> str:
        return self.name.partition(".resnets" if self.kind == "resnet" else ".attentions")[0]

    @property
    def transformer_block(self) -> str | None:
        """Name of the one transformer block that the width vectors narrow; None of a ResNet, and of a Transformer whose
        blocks are sites."""
        if self.kind == "transformer":
            return f"{self.name}.transformer_blocks.0" if self.widths else None
        return self.name if self.kind == "transformer_block" else None


def _resnet(name: str, cin: int, skip: int, cout: int, stride: int, last: bool, config: UNetConfig) -> Site:
    rows = ("conv1.weight", "conv1.bias", "time_emb_proj.weight", "time_emb_proj.bias", "norm2.weight", "norm2.bias")
    groups = config.norm_num_groups
    width = Width("groups", groups, cout // groups, (*(Cut(r, 0) for r in rows), Cut("conv2.weight", 1)))
    return Site(name, "resnet", cin, skip, cout, stride, (width,), last and cin - skip == cout)


def _transformer(
    name: str, depth: int, channels: int, heads: int, stride: int, last: bool, config: UNetConfig
) -> list[Site]:
    """A Transformer: one site if it has one block, otherwise itself and its blocks."""

    def widths(prefix: str) -> tuple[Width, ...]:
        def attention(part: Literal["attn1", "attn2"]) -> Width:
            base = f"{prefix}{part}"
            cuts = (*(Cut(f"{base}.to_{p}.weight", 0) for p in "qkv"), Cut(f"{base}.to_out.0.weight", 1))
            return Width(part, heads, channels // heads, cuts)

        base, groups = f"{prefix}ff.net", config.norm_num_groups
        geglu = (Cut(f"{base}.0.proj.weight", 0, 2), Cut(f"{base}.0.proj.bias", 0, 2), Cut(f"{base}.2.weight", 1))
        return attention("attn1"), attention("attn2"), Width("ff", groups, 4 * channels // groups, geglu)

    if depth == 1:
        return [Site(name, "transformer", channels, 0, channels, stride, widths("transformer_blocks.0."), last)]
    blocks = [
        Site(
            f"{name}.transformer_blocks.{k}", "transformer_block", channels, 0, channels, stride, widths(""), True, name
        )
        for k in range(depth)
    ]
    return [Site(name, "transformer", channels, 0, channels, stride, (), last), *blocks]


@lru_cache
def sites(config: UNetConfig) -> tuple[Site, ...]:
    """Every prunable site in the order of the architecture vector: 38 for SD 2.1, 98 for SDXL."""
    channels, levels = config.block_out_channels, len(config.block_out_channels)
    found: list[Site] = []

    def attend(block: str, depths: tuple[int, ...], level: int, ends: bool) -> None:
        for j, depth in enumerate(depths):
            last, name = ends and j == len(depths) - 1, f"{block}.attentions.{j}"
            found.extend(_transformer(name, depth, channels[level], config.num_heads[level], 2**level, last, config))

    for i, kind in enumerate(config.down_block_types):
        block, stride, cout, layers = f"down_blocks.{i}", 2**i, channels[i], config.layers(i)
        for j in range(layers):
            cin = channels[max(i - 1, 0)] if j == 0 else cout
            found.append(_resnet(f"{block}.resnets.{j}", cin, 0, cout, stride, j == layers - 1, config))
        if kind == "CrossAttnDownBlock2D":
            attend(block, config.depths("down", i), i, True)
    if config.mid_block_type:
        cout, stride, attends = channels[-1], 2 ** (levels - 1), config.mid_block_type == "UNetMidBlock2DCrossAttn"
        found += [_resnet(f"mid_block.resnets.{j}", cout, 0, cout, stride, False, config) for j in range(1 + attends)]
        if attends:
            attend("mid_block", config.depths("mid"), levels - 1, False)
    for i, kind in enumerate(config.up_block_types):
        level = levels - 1 - i
        block, stride, cout, layers = f"up_blocks.{i}", 2**level, channels[level], config.layers(level) + 1
        for j in range(layers):
            last = j == layers - 1
            below = channels[min(level + 1, levels - 1)] if j == 0 else cout
            skip = channels[max(level - 1, 0)] if last else cout
            found.append(_resnet(f"{block}.resnets.{j}", below + skip, skip, cout, stride, last, config))
        if kind == "CrossAttnUpBlock2D":
            attend(block, config.depths("up", i), level, True)
    return tuple(found)


@lru_cache
def with_blocks(config: UNetConfig, names: frozenset[str]) -> frozenset[str]:
    """These sites, and the transformer blocks of those that are Transformers: what goes when they are dropped."""
    return names | {site.name for site in sites(config) if site.within in names}


@lru_cache
def with_emptied(config: UNetConfig, names: frozenset[str]) -> frozenset[str]:
    """These sites, and the Transformers all of whose blocks are among them: a shell around nothing serves no one."""
    left = {site.within for site in sites(config) if site.within and site.name not in names}
    return names | {site.within for site in sites(config) if site.name in names and site.within} - left
