"""The dense UNet of a model folder, as its `config.json` describes it: `UNetConfig`, and what is refused and why.

Fields are those of a diffusers `UNet2DConditionModel` that the families of Stable Diffusion 1.x, 2.x and XL use, those
of smaller models cut from XL (SSD-1B, Segmind-Vega, KOALA) among them. All other fields have one value here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import clip, read_json, whole
from bilevel_fast.base.limits import BLOCK_LAYERS, CHANNELS, LATENTS, LEVELS
from bilevel_fast.models.conditioning import SIZES, extra_rows

# Fields that would change the network and that these families leave at one value. A missing field has that value.
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None, "text_time"),
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
}
_WHOSE = {"time_cond_proj_dim": "a UNet that is told the guidance, as latent consistency models are"}
_BLOCK_TYPES = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
}

Depths = int | tuple[int | tuple[int, ...], ...]
"""Transformer blocks of each Transformer: the same everywhere, by level, or of each Transformer of a level."""


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
    """`UNetMidBlock2D` is a single ResNet, None no block at all."""
    layers_per_block: int | tuple[int, ...] = 2
    """ResNets of a down block, by level if it is a tuple; up blocks have one more."""
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = True
    transformer_layers_per_block: Depths = 1
    """Outermost level first. Of levels without attention it says nothing. The mid block's is the last."""
    reverse_transformer_layers_per_block: Depths | None = None
    """Of the up blocks, innermost level first; None: as the down blocks."""
    addition_embed_type: str | None = None
    """`text_time`: the UNet reads what `models.conditioning` packs behind the text."""
    addition_time_embed_dim: int | None = None
    """Width of the embedding of each of the six size numbers."""
    projection_class_embeddings_input_dim: int | None = None
    """Width of the pooled state and the six embeddings together."""

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
        self._check_layers(levels)
        self._check_addition()

    def _check_layers(self, levels: int) -> None:
        for field in ("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block"):
            value = getattr(self, field)
            if isinstance(value, tuple) and len(value) != levels:
                raise UserError(f"UNet config: {field} has {len(value)} entries, wanted {levels}")
        down, up = self.transformer_layers_per_block, self.reverse_transformer_layers_per_block
        if up is None and isinstance(down, tuple) and any(isinstance(depths, tuple) for depths in down):
            raise UserError(
                "UNet config: transformer_layers_per_block has lists in its list and says nothing of the up blocks; "
                "wanted reverse_transformer_layers_per_block, too"
            )
        for place, types, field in (
            ("down", self.down_block_types, "transformer_layers_per_block"),
            ("up", self.up_block_types, "reverse_transformer_layers_per_block"),
        ):
            for i, kind in enumerate(types):
                depths = self._depths(place, i)
                wanted = self.layers(i if place == "down" else levels - 1 - i) + (place == "up")
                if kind.startswith("CrossAttn") and isinstance(depths, tuple) and len(depths) != wanted:
                    raise UserError(
                        f"UNet config: {field} has {len(depths)} entries for {place}_blocks.{i}, wanted {wanted}"
                    )

    def _check_addition(self) -> None:
        each, total = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if self.addition_embed_type is None:
            return
        if each is None or total is None:
            raise UserError(
                "UNet config: addition_embed_type is 'text_time', wanted addition_time_embed_dim and "
                "projection_class_embeddings_input_dim, too"
            )
        if each % 2 or total <= SIZES * each:
            raise UserError(
                f"UNet config: projection_class_embeddings_input_dim is {total}, wanted more than {SIZES} x {each}, "
                "and addition_time_embed_dim even"
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

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled state that is read beside the text; 0 if there is none."""
        if self.addition_embed_type is None:
            return 0
        assert self.addition_time_embed_dim is not None
        assert self.projection_class_embeddings_input_dim is not None
        return self.projection_class_embeddings_input_dim - SIZES * self.addition_time_embed_dim

    @property
    def extra_rows(self) -> int:
        """Rows that a text tensor has behind its tokens: R of `models.conditioning`."""
        return extra_rows(self.cross_attention_dim, self.pooled_dim)

    @property
    def is_plain(self) -> bool:
        """Whether it says nothing that Stable Diffusion 1.x / 2.x leave unsaid."""
        plain = isinstance(self.layers_per_block, int) and self.mid_block_type != "UNetMidBlock2D"
        return plain and all(getattr(self, name) == default for name, default in _LATER.items())

    def layers(self, level: int) -> int:
        """ResNets of the down block of a level."""
        return self.layers_per_block if isinstance(self.layers_per_block, int) else self.layers_per_block[level]

    def depths(self, place: Literal["down", "mid", "up"], index: int = 0) -> tuple[int, ...]:
        """Transformer blocks of each Transformer of a block; `index` counts blocks in the order of execution."""
        depths = self._depths(place, index)
        if place == "mid":
            return (depths[0] if isinstance(depths, tuple) else depths,)  # one Transformer reads the first
        level = index if place == "down" else len(self.block_out_channels) - 1 - index
        return (depths,) * (self.layers(level) + (place == "up")) if isinstance(depths, int) else depths

    def _depths(self, place: str, index: int) -> int | tuple[int, ...]:
        given = self.transformer_layers_per_block
        if place == "up" and self.reverse_transformer_layers_per_block is not None:
            given = self.reverse_transformer_layers_per_block
        elif place == "up":
            index = -1 - index
        return given if isinstance(given, int) else given[-1 if place == "mid" else index]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str = "UNet config") -> "UNetConfig":
        """Build from a diffusers `config.json`.

        Raises:
            UserError: A field is missing, or has a value that these families do not have. `source` is named.
        """
        for field, allowed in _FIXED.items():
            if fields.get(field, allowed[0]) not in allowed:
                whose = f" ({_WHOSE[field]})" if field in _WHOSE else ""
                wanted = " or ".join(map(repr, allowed)) if field == "addition_embed_type" else repr(allowed[0])
                raise UserError(f"{source}: {field}={clip(fields[field])} is not supported{whose}, wanted {wanted}")
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
        addition = fields.get("addition_embed_type")
        try:
            config = cls(
                sample_size=read.number("sample_size", LATENTS),
                in_channels=read.number("in_channels"),
                out_channels=read.number("out_channels"),
                block_out_channels=channels,
                down_block_types=read.names("down_block_types"),
                up_block_types=read.names("up_block_types"),
                num_heads=read.numbers(heads, len(channels)),
                cross_attention_dim=read.number("cross_attention_dim"),
                mid_block_type=fields.get("mid_block_type", "UNetMidBlock2DCrossAttn"),
                layers_per_block=read.layers("layers_per_block", len(channels), 2),
                norm_num_groups=read.number("norm_num_groups", CHANNELS, 32),
                norm_eps=read.epsilon("norm_eps", 1e-5),
                use_linear_projection=bool(fields.get("use_linear_projection", False)),
                transformer_layers_per_block=read.depths("transformer_layers_per_block", len(channels), 1),
                reverse_transformer_layers_per_block=None
                if fields.get("reverse_transformer_layers_per_block") is None
                else read.depths("reverse_transformer_layers_per_block", len(channels)),
                addition_embed_type=addition,
                addition_time_embed_dim=read.number("addition_time_embed_dim") if addition else None,
                projection_class_embeddings_input_dim=read.number("projection_class_embeddings_input_dim")
                if addition
                else None,
            )
        except UserError as error:
            raise error if str(error).startswith(source) else UserError(f"{source}: {error}") from error
        if said := _another_kind(config):
            raise UserError(f"{source}: {said}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields of a diffusers `config.json`; `from_dict` reads them back, and so does diffusers.

        What Stable Diffusion 1.x / 2.x leave unsaid is left out where it has its default.
        """
        fields = {k: _listed(v) for k, v in asdict(self).items() if k not in _LATER or v != _LATER[k]}
        fields["attention_head_dim"] = fields.pop("num_heads")
        return {"_class_name": "UNet2DConditionModel", **fields}

    @classmethod
    def load(cls, folder: Path) -> "UNetConfig":
        """Read `folder/config.json`."""
        path = folder / "config.json"
        return cls.from_dict(read_json(path), str(path))


_LATER = {
    field.name: field.default
    for field in fields(UNetConfig)
    if field.name.endswith("transformer_layers_per_block")
    or field.name.startswith(("addition_", "projection_class_embeddings"))
}
"""Fields that came with Stable Diffusion XL, and their defaults."""


def _another_kind(config: UNetConfig) -> str | None:
    """What a UNet is that these families cannot use, and what was wanted; None if it is one of theirs."""
    came, out = config.in_channels, config.out_channels
    if came in (2 * out, 2 * out + 1):
        kind = "an inpainting UNet, which reads a mask and a masked picture"
        if came == 2 * out:
            kind = "a UNet that edits pictures, and reads one"
        return f"in_channels is {came}: {kind} beside its {out} latents; wanted in_channels {out}"
    each, total = config.addition_time_embed_dim, config.projection_class_embeddings_input_dim
    if each is not None and total is not None and total - 5 * each == config.cross_attention_dim:
        return (
            f"projection_class_embeddings_input_dim is {total} = {config.cross_attention_dim} + 5 x {each}: the "
            f"refiner of Stable Diffusion XL; wanted its base model, which reads {SIZES} sizes"
        )
    return None


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, tuple) else value


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

    def layers(self, name: str, levels: int, default: int) -> int | tuple[int, ...]:
        """One number, or one for each level; of equal ones the one."""
        return self._levels(name, levels, default, lambda each: whole(each, f"{self.source}: {name}", 1, BLOCK_LAYERS))

    def depths(self, name: str, levels: int, default: int | None = None) -> Depths:
        """One number, or for each level one or a list of them."""

        def depth(value: Any) -> int | tuple[int, ...]:
            if not isinstance(value, list | tuple):
                return whole(value, f"{self.source}: {name}", 0, BLOCK_LAYERS)
            if not 1 <= len(value) <= BLOCK_LAYERS + 1:
                raise UserError(f"{self.source}: {name} has {clip(value)}, wanted 1 to {BLOCK_LAYERS + 1} numbers")
            return tuple(whole(each, f"{self.source}: {name}", 0, BLOCK_LAYERS) for each in value)

        return self._levels(name, levels, default, depth)

    def names(self, name: str) -> tuple[str, ...]:
        return tuple(self._list(name, self._get(name, None)))

    def epsilon(self, name: str, default: float) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not 0 < value < 1:
            raise UserError(f"{self.source}: {name} is {clip(value)}, wanted a number > 0 and < 1")
        return float(value)

    def _levels(self, name: str, levels: int, default: int | None, read: Callable[[Any], Any]) -> Any:
        value = self._get(name, default)
        if not isinstance(value, list | tuple):
            return read(value)
        found = tuple(read(each) for each in self._list(name, value))
        same = len(found) == levels and isinstance(found[0], int) and set(found) == {found[0]}
        return found[0] if same else found

    def _get(self, name: str, default: Any) -> Any:
        if name not in self.fields and default is None:
            raise UserError(f"{self.source}: field {name!r} is missing")
        return self.fields.get(name, default)

    def _list(self, name: str, value: Any) -> Sequence[Any]:
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= LEVELS:
            raise UserError(f"{self.source}: {name} is {clip(value)}, wanted a list of 1 to {LEVELS}")
        return value
