"""What a Stable Diffusion UNet is made of: its configuration and the sites that pruning may narrow or drop.

`UNetConfig` holds the fields of a diffusers `UNet2DConditionModel` that the SD 1.x / 2.x family uses.
`sites` walks the network once and lists every ResNet and Transformer in the order of the APTP architecture
vector (arXiv:2406.12042): block by block (down, mid, up), first the ResNets of the block, then its Transformers.

    ResNet       1 width vector:   groups (GroupNorm groups of the inner channels)
    Transformer  3 width vectors:  attn1 (self-attention heads), attn2 (cross-attention heads), ff (FFN groups)
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import clip, read_json, whole
from bilevel_fast.base.limits import BLOCK_LAYERS, CHANNELS, LATENTS, LEVELS

# Fields that would change the network and that this family leaves at one value. A missing field has that value.
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
}
_BLOCK_TYPES = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
}


@dataclass(frozen=True)
class UNetConfig:
    """The dense UNet. Field names and defaults are those of diffusers, except `num_heads`.

    Raises:
        UserError: The fields contradict each other (a width that the norm groups or heads do not divide, ...).
    """

    sample_size: int
    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    num_heads: tuple[int, ...]
    """Attention heads per level, outermost first. diffusers calls it `attention_head_dim`."""
    cross_attention_dim: int
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = True

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for field in ("down_block_types", "up_block_types", "num_heads"):
            if len(getattr(self, field)) != levels:
                raise UserError(f"UNet config: {field} has {len(getattr(self, field))} entries, wanted {levels}")
        for channels, heads in zip(self.block_out_channels, self.num_heads, strict=True):
            if channels % self.norm_num_groups or channels % heads:
                raise UserError(
                    f"UNet config: {channels} channels are not divisible by "
                    f"{self.norm_num_groups} norm groups and {heads} heads"
                )

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks whose outputs are distilled, in the order of execution: 9 for SD 2.1."""
        down = [f"down_blocks.{i}" for i in range(len(self.down_block_types))]
        up = [f"up_blocks.{i}" for i in range(len(self.up_block_types))]
        return (*down, *(["mid_block"] if self.mid_block_type else []), *up)

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.block_out_channels[0]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "UNet config") -> "UNetConfig":
        """Build from a diffusers `config.json`.

        Raises:
            UserError: A field is missing, or has a value outside the SD 1.x / 2.x family. `source` is named.
        """
        for field, allowed in _FIXED.items():
            if fields.get(field, allowed[0]) not in allowed:
                raise UserError(f"{source}: {field}={clip(fields[field])} is not supported, wanted {allowed[0]!r}")
        for field, allowed in _BLOCK_TYPES.items():
            value = fields.get(field, allowed[0] if field == "mid_block_type" else ())
            if field != "mid_block_type" and not isinstance(value, list | tuple):
                raise UserError(f"{source}: {field} is {clip(value)}, wanted a list of {allowed}")
            for kind in value if isinstance(value, list | tuple) else (value,):
                if kind not in allowed:
                    raise UserError(f"{source}: {field} has {clip(kind)}, supported are {allowed}")
        heads = "attention_head_dim" if fields.get("num_attention_heads") is None else "num_attention_heads"
        read = _Reader(fields, source)
        channels = read.numbers("block_out_channels")
        try:
            return cls(
                sample_size=read.number("sample_size", LATENTS),
                in_channels=read.number("in_channels"),
                out_channels=read.number("out_channels"),
                block_out_channels=channels,
                down_block_types=read.names("down_block_types"),
                up_block_types=read.names("up_block_types"),
                num_heads=read.numbers(heads, len(channels)),
                cross_attention_dim=read.number("cross_attention_dim"),
                mid_block_type=fields.get("mid_block_type", "UNetMidBlock2DCrossAttn"),
                layers_per_block=read.number("layers_per_block", BLOCK_LAYERS, 2),
                norm_num_groups=read.number("norm_num_groups", CHANNELS, 32),
                norm_eps=read.epsilon("norm_eps", 1e-5),
                use_linear_projection=bool(fields.get("use_linear_projection", False)),
            )
        except UserError as error:
            raise error if str(error).startswith(source) else UserError(f"{source}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields of a diffusers `config.json`; `from_dict` reads them back, and so does diffusers."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        fields["attention_head_dim"] = fields.pop("num_heads")
        return {"_class_name": "UNet2DConditionModel", **fields}

    @classmethod
    def load(cls, folder: Path) -> "UNetConfig":
        """Read `folder/config.json`."""
        path = folder / "config.json"
        return cls.from_dict(read_json(path), str(path))


@dataclass(frozen=True)
class _Reader:
    """Fields of a config that came from outside: of the kind that is wanted and of a size that can be built."""

    fields: Mapping[str, Any]
    source: str

    def number(self, name: str, most: int = CHANNELS, default: int | None = None) -> int:
        return whole(self._get(name, default), f"{self.source}: {name}", 1, most)

    def numbers(self, name: str, count: int | None = None) -> tuple[int, ...]:
        """A list, or of one number `count` times that number."""
        value = self._get(name, None)
        if count is not None and not isinstance(value, list | tuple):
            return (self.number(name),) * count
        return tuple(whole(each, f"{self.source}: {name}", 1, CHANNELS) for each in self._list(name, value))

    def names(self, name: str) -> tuple[str, ...]:
        return tuple(self._list(name, self._get(name, None)))

    def epsilon(self, name: str, default: float) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0 < value < 1:
            raise UserError(f"{self.source}: {name} is {clip(value)}, wanted a number > 0 and < 1")
        return float(value)

    def _get(self, name: str, default: Any) -> Any:
        if name not in self.fields and default is None:
            raise UserError(f"{self.source}: field {name!r} is missing")
        return self.fields.get(name, default)

    def _list(self, name: str, value: Any) -> Sequence[Any]:
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= LEVELS:
            raise UserError(f"{self.source}: {name} is {clip(value)}, wanted a list of 1 to {LEVELS}")
        return value


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
    kind: Literal["resnet", "transformer"]
    in_channels: int
    """Channels of the input, those of the skip connection included."""
    skip_channels: int
    """How many of `in_channels` come, concatenated last, from the skip connection; 0 outside up blocks."""
    out_channels: int
    stride: int
    """Latent size divided by the size this site works at."""
    widths: tuple[Width, ...]
    depth_bit: bool
    """The architecture vector has a bit that drops the site: the last of its kind in a down or up block."""

    @property
    def droppable(self) -> bool:
        """Dropping leaves all shapes as they are."""
        return self.in_channels - self.skip_channels == self.out_channels

    @property
    def block(self) -> str:
        return self.name.partition(".resnets" if self.kind == "resnet" else ".attentions")[0]


def _resnet(name: str, cin: int, skip: int, cout: int, stride: int, last: bool, config: UNetConfig) -> Site:
    rows = ("conv1.weight", "conv1.bias", "time_emb_proj.weight", "time_emb_proj.bias", "norm2.weight", "norm2.bias")
    groups = config.norm_num_groups
    width = Width("groups", groups, cout // groups, (*(Cut(r, 0) for r in rows), Cut("conv2.weight", 1)))
    return Site(name, "resnet", cin, skip, cout, stride, (width,), last and cin - skip == cout)


def _transformer(name: str, channels: int, heads: int, stride: int, last: bool, config: UNetConfig) -> Site:
    def attention(part: Literal["attn1", "attn2"]) -> Width:
        base = f"transformer_blocks.0.{part}"
        cuts = (*(Cut(f"{base}.to_{p}.weight", 0) for p in "qkv"), Cut(f"{base}.to_out.0.weight", 1))
        return Width(part, heads, channels // heads, cuts)

    base, groups = "transformer_blocks.0.ff.net", config.norm_num_groups
    geglu = (Cut(f"{base}.0.proj.weight", 0, 2), Cut(f"{base}.0.proj.bias", 0, 2), Cut(f"{base}.2.weight", 1))
    widths = (attention("attn1"), attention("attn2"), Width("ff", groups, 4 * channels // groups, geglu))
    return Site(name, "transformer", channels, 0, channels, stride, widths, last)


@lru_cache
def sites(config: UNetConfig) -> tuple[Site, ...]:
    """Every prunable site in the order of the architecture vector: 38 for SD 2.1."""
    channels, levels, layers = config.block_out_channels, len(config.block_out_channels), config.layers_per_block
    found: list[Site] = []
    for i, kind in enumerate(config.down_block_types):
        block, stride, cout = f"down_blocks.{i}", 2**i, channels[i]
        for j in range(layers):
            cin = channels[max(i - 1, 0)] if j == 0 else cout
            found.append(_resnet(f"{block}.resnets.{j}", cin, 0, cout, stride, j == layers - 1, config))
        if kind == "CrossAttnDownBlock2D":
            for j in range(layers):
                last = j == layers - 1
                name = f"{block}.attentions.{j}"
                found.append(_transformer(name, cout, config.num_heads[i], stride, last, config))
    if config.mid_block_type:
        cout, stride = channels[-1], 2 ** (levels - 1)
        found += [_resnet(f"mid_block.resnets.{j}", cout, 0, cout, stride, False, config) for j in range(2)]
        found.append(_transformer("mid_block.attentions.0", cout, config.num_heads[-1], stride, False, config))
    for i, kind in enumerate(config.up_block_types):
        level = levels - 1 - i
        block, stride, cout = f"up_blocks.{i}", 2**level, channels[level]
        for j in range(layers + 1):
            last = j == layers
            below = channels[min(level + 1, levels - 1)] if j == 0 else cout
            skip = channels[max(level - 1, 0)] if last else cout
            found.append(_resnet(f"{block}.resnets.{j}", below + skip, skip, cout, stride, last, config))
        if kind == "CrossAttnUpBlock2D":
            for j in range(layers + 1):
                name = f"{block}.attentions.{j}"
                found.append(_transformer(name, cout, config.num_heads[level], stride, j == layers, config))
    return tuple(found)
