"""The Stable Diffusion UNet, teacher and student alike: built from a config and a Structure.

    prediction = UNet(config, structure)(x, t, text)

State-dict keys and shapes are those of diffusers' `UNet2DConditionModel` (narrower where pruned), so weights load
unchanged in both directions. The forward pass *returns* the block outputs that distillation compares; there are no
hooks; whoever wants another ResNet or Transformer passes `Sites`. Activations are channels_last throughout: a
Transformer sees (B, H*W, C) without a copy.

Legend: B batch, C channels, H W latent size, T = H*W image tokens, L text tokens, D text width, N heads.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import Site, UNetConfig, sites
from bilevel_fast.models.conditioning import SIZES, Extra, unpack
from bilevel_fast.models.structure import Structure
from bilevel_fast.ops.dispatch import (
    Branch,
    add_norm,
    attention,
    geglu,
    group_norm_and_input,
    group_norm_silu,
    group_norm_silu_and_input,
    group_norm_silu_of_two,
    linear,
)
from bilevel_fast.ops.products import lay_together, products
from bilevel_fast.ops.shortcut import widened


@dataclass(frozen=True)
class Prediction:
    """What a UNet says about a noisy batch.

    Attributes:
        out: (B, C_out, H, W), the network output: v for SD 2.1.
        blocks: Outputs of the down blocks, the mid block and the up blocks, after their down- or upsampler.
            Pruning leaves their shapes alone. Nine for SD 2.1.
    """

    out: Tensor
    blocks: tuple[Tensor, ...]


class Dropped(nn.Module):
    """Stands where a site was dropped: hands its first input on. A ResNet's skip connection is ignored."""

    def forward(self, x: Tensor, *_: Tensor | None) -> Tensor:
        return x


class ResNet(nn.Module):
    """Residual block; only its inner width is prunable.

    The inner channels may be stored padded: `pad` zero channels after the real ones. They start at zero, GroupNorm
    does not see them and their gradients are exactly zero, so they stay zero and change nothing. The state dict
    holds the real channels only.
    """

    def __init__(self, site: Site, groups: int, config: UNetConfig, align: int):
        super().__init__()
        inner = groups * site.widths[0].unit_size
        self.inner, self.pad = inner, -inner % align
        self.norm1 = nn.GroupNorm(config.norm_num_groups, site.in_channels, config.norm_eps)
        self.conv1 = nn.Conv2d(site.in_channels, inner + self.pad, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.time_embed_dim, inner + self.pad)
        self.norm2 = nn.GroupNorm(groups, inner, config.norm_eps)
        self.conv2 = nn.Conv2d(inner + self.pad, site.out_channels, 3, padding=1)
        widen = site.in_channels != site.out_channels
        self.conv_shortcut = nn.Conv2d(site.in_channels, site.out_channels, 1) if widen else None
        if self.pad:
            self._zero_padding()
            self.register_load_state_dict_pre_hook(_pad_on_load)
            self.register_state_dict_post_hook(_crop_on_save)

    def _zero_padding(self) -> None:
        with torch.no_grad():
            for name, axis in _PADDED.items():
                self.get_parameter(name).narrow(axis, self.inner, self.pad).zero_()

    def forward(self, x: Tensor, skip: Tensor | None, time: Tensor) -> Tensor:
        """x (B, C, H, W), skip (B, C_skip, H, W) or None, time = SiLU of the time embedding (B, 4 C_0)."""
        if skip is None:
            h, x = group_norm_silu_and_input(x, self.norm1)
            sources = (x,)
        else:
            h, sources = group_norm_silu_of_two(x, skip, self.norm1)
        h = group_norm_silu(self.conv1(h), self.norm2, self.pad, self.time_emb_proj(time))
        widen = self.conv_shortcut
        whole = None if widen is None else widened(h, self.conv2, sources, widen)
        if whole is not None:
            return whole
        x = sources[0] if len(sources) == 1 else torch.cat(sources, dim=1)
        return self.conv2(h) + (x if widen is None else widen(x))


_PADDED = {"conv1.weight": 0, "conv1.bias": 0, "time_emb_proj.weight": 0, "time_emb_proj.bias": 0, "conv2.weight": 1}


def _pad_on_load(module: ResNet, state: dict[str, Tensor], prefix: str, *_) -> None:
    for name, axis in _PADDED.items():
        value = state.get(prefix + name)
        if value is not None and value.shape[axis] == module.inner:
            zeros = value.new_zeros([module.pad if d == axis else s for d, s in enumerate(value.shape)])
            state[prefix + name] = torch.cat([value, zeros], dim=axis)


def _crop_on_save(module: ResNet, state: dict[str, Tensor], prefix: str, *_) -> None:
    for name, axis in _PADDED.items():
        state[prefix + name] = state[prefix + name].narrow(axis, 0, module.inner)


class Attention(nn.Module):
    """Multi-head attention over the kept heads; q, k, v without bias."""

    def __init__(self, channels: int, context: int, heads: int, head_dim: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, heads * head_dim, bias=False)
        self.to_k = nn.Linear(context, heads * head_dim, bias=False)
        self.to_v = nn.Linear(context, heads * head_dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, channels)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor | Branch:
        """x (B, T, C), context (B, S, D) -> (B, T, C), for `add_norm`."""
        if context is x:
            q, k, v = products(x, self.to_q, self.to_k, self.to_v)
        else:
            q, (k, v) = self.to_q(x), products(context, self.to_k, self.to_v)
        return linear(attention(q, k, v, self.heads), self.to_out[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Attention":
        super()._apply(fn, recurse)
        plain = all(type(layer) is nn.Linear for layer in (self.to_q, self.to_k, self.to_v))  # others in fp8
        if plain and self.to_q.weight.device.type != "cpu":
            together = [self.to_k, self.to_v]
            if self.to_q.in_features == self.to_k.in_features:
                together.insert(0, self.to_q)
            lay_together(*together)
        return self


class GEGLU(nn.Module):
    """A linear layer to a value and a gate of `inner` channels each: value times GELU(gate)."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        return geglu(x, self.proj)


class FeedForward(nn.Module):
    """`GEGLU` to `inner` channels, and a linear layer back."""

    def __init__(self, channels: int, inner: int):
        super().__init__()
        # index 1 is a dropout of rate 0 in diffusers; it holds the place of the key `net.2`
        self.net = nn.Sequential(GEGLU(channels, inner), nn.Identity(), nn.Linear(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return self.net(x)


Attend = Callable[[str, Attention, Tensor, Tensor], Tensor | Branch]
"""("attn1" or "attn2", module, x (B, T, C), context (B, S, D)) -> (B, T, C)"""
Feed = Callable[[FeedForward, Tensor], Tensor]
"""(module, x (B, T, C)) -> (B, T, C)"""


def _attend(_: str, module: nn.Module, x: Tensor, context: Tensor) -> Tensor | Branch:
    return module(x, context)


def _feed(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each behind a LayerNorm and added to its input."""

    def __init__(self, site: Site, structure: Structure):
        super().__init__()
        channels, (attn1, attn2, ff) = site.out_channels, site.widths
        text_width, kept = structure.config.cross_attention_dim, _kept(structure, site)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = Attention(channels, channels, kept["attn1"], attn1.unit_size)
        self.attn2 = Attention(channels, text_width, kept["attn2"], attn2.unit_size)
        self.ff = FeedForward(channels, kept["ff"] * ff.unit_size)

    def forward(self, h: Tensor | Branch, text: Tensor, attend: Attend = _attend, feed: Feed = _feed) -> Tensor:
        """h (B, T, C), text (B, L, D) -> (B, T, C)."""
        h, n = add_norm(None, h, self.norm1)
        h, n = add_norm(h, attend("attn1", self.attn1, n, n), self.norm2)
        h, n = add_norm(h, attend("attn2", self.attn2, n, text), self.norm3)
        return h + feed(self.ff, n)


def _kept(structure: Structure, site: Site) -> dict[str, int]:
    return {width.name: structure.count(site, width) for width in site.widths}


Run = Callable[[int, TransformerBlock, Tensor | Branch, Tensor], Tensor | Branch]
"""(number of the block, module, h (B, T, C), text (B, L, D)) -> (B, T, C)"""


def _run(_: int, module: nn.Module, h: Tensor | Branch, text: Tensor) -> Tensor | Branch:
    return module(h, text)


class Transformer(nn.Module):
    """GroupNorm, projection in, blocks of self-attention, cross-attention and GEGLU, projection out, residual.

    Args:
        site: Its site.
        blocks: The sites of its blocks, where it is not itself the site of its only one.
        structure: What is kept.
    """

    def __init__(self, site: Site, blocks: Sequence[Site], structure: Structure):
        super().__init__()
        channels, config = site.out_channels, structure.config
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        self.linear = config.use_linear_projection
        # SD 1.x stores the same projections as 1x1 convolutions
        project = nn.Linear if self.linear else lambda i, o: nn.Conv2d(i, o, 1)
        self.proj_in = project(channels, channels)
        members = [site] if site.widths else blocks
        self.transformer_blocks = nn.ModuleList(
            [
                Dropped() if member.name in structure.dropped else TransformerBlock(member, structure)
                for member in members
            ]
        )
        self.proj_out = project(channels, channels)

    def forward(self, x: Tensor, text: Tensor, run: Run = _run) -> Tensor:
        """x (B, C, H, W), text (B, L, D) -> (B, C, H, W); `run` runs the blocks."""
        h, x = group_norm_and_input(x, self.norm)
        h = linear(_to_tokens(h), self.proj_in) if self.linear else _to_tokens(self.proj_in(h))
        for number, block in enumerate(self.transformer_blocks):
            h = run(number, block, h, text)  # pyright: ignore[reportArgumentType]  # or a Dropped one
        h = whole(h)
        h = self.proj_out(h) if self.linear else h
        h = h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return x + (h if self.linear else self.proj_out(h))


def whole(h: Tensor | Branch) -> Tensor:
    """What a Transformer hands its blocks, with the bias that may still be missing."""
    return h.whole() if isinstance(h, Branch) else h


def _to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) channels_last -> (B, T, C), a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class Resample(nn.Module):
    """Holds `conv` under diffusers' key; stride 2 shrinks, stride 1 follows a nearest-neighbour enlargement."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h)


@dataclass(frozen=True)
class Sites:
    """How the sites of a dense UNet are run: called with the site's name and its module, in place of the module.

    Attributes:
        resnet: (name, module, h (B, C, H, W), skip connection or None, SiLU of the time embedding (B, 4 C_0))
            -> (B, C_out, H, W).
        transformer: (name, module, h (B, C, H, W), text (B, L, D)) -> (B, C, H, W).
    """

    resnet: Callable[[str, ResNet, Tensor, Tensor | None, Tensor], Tensor]
    transformer: Callable[[str, Transformer, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """The ResNets of a block, its Transformers, and at most one resampler.

    Called with h (B, C, H, W), the SiLU of the time embedding, text states, the list of skip connections, which down
    blocks push to and up blocks pop from, and how sites are run.

    Attributes:
        recompute: Whether backward computes the inside of a ResNet or Transformer again, from its inputs, instead of
            finding it in memory.
    """

    def __init__(self, name: str, structure: Structure, align: int, resample: str | None):
        super().__init__()
        self.name, self.recompute = name, False
        config = structure.config
        members = [site for site in sites(config) if site.block == name]

        def build(site: Site) -> nn.Module:
            if site.name in structure.dropped:
                return Dropped()
            if site.kind == "resnet":
                return ResNet(site, structure.count(site, site.widths[0]), config, align)
            return Transformer(site, [member for member in members if member.within == site.name], structure)

        self.resnets = nn.ModuleList([build(s) for s in members if s.kind == "resnet"])
        attentions = [build(s) for s in members if s.kind == "transformer"]
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        channels = members[0].out_channels
        if resample == "downsamplers":
            self.downsamplers = nn.ModuleList([Resample(channels, stride=2)])
        elif resample == "upsamplers":
            self.upsamplers = nn.ModuleList([Resample(channels, stride=1)])

    def resnet(self, index: int, h: Tensor, skip: Tensor | None, time: Tensor, run: Sites | None) -> Tensor:
        module: Any = self.resnets[index]
        call = module if run is None else partial(run.resnet, f"{self.name}.resnets.{index}", module)
        return self._run(call, h, skip, time)

    def attend(self, index: int, h: Tensor, text: Tensor, run: Sites | None) -> Tensor:
        if not hasattr(self, "attentions"):
            return h
        module: Any = self.attentions[index]
        call = module if run is None else partial(run.transformer, f"{self.name}.attentions.{index}", module)
        return self._run(call, h, text)

    def _run(self, call: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            # nothing inside draws random numbers, and their state cannot be read while a CUDA graph is captured
            return checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]
        return call(*inputs)


class DownBlock(Block):
    """ResNets, each with its Transformer, then a downsampler; every output goes to `skips`."""

    def forward(self, h: Tensor, time: Tensor, text: Tensor, skips: list[Tensor], run: Sites | None) -> Tensor:
        for j in range(len(self.resnets)):
            h = self.attend(j, self.resnet(j, h, None, time, run), text, run)
            skips.append(h)
        if hasattr(self, "downsamplers"):
            h = self.downsamplers[0](h)
            skips.append(h)
        return h


class MidBlock(Block):
    """A ResNet, a Transformer, a ResNet; or a single ResNet."""

    def forward(self, h: Tensor, time: Tensor, text: Tensor, _: list[Tensor], run: Sites | None) -> Tensor:
        h = self.resnet(0, h, None, time, run)
        for j in range(1, len(self.resnets)):
            h = self.resnet(j, self.attend(j - 1, h, text, run), None, time, run)
        return h


class UpBlock(Block):
    """ResNets over `skips`, the last one first, each with its Transformer; then an upsampler."""

    def forward(self, h: Tensor, time: Tensor, text: Tensor, skips: list[Tensor], run: Sites | None) -> Tensor:
        for j in range(len(self.resnets)):
            h = self.attend(j, self.resnet(j, h, skips.pop(), time, run), text, run)
        if hasattr(self, "upsamplers"):
            # to the size of the next skip connection: an odd size halved was rounded up
            h = self.upsamplers[0](F.interpolate(h, size=skips[-1].shape[2:], mode="nearest"))
        return h


def waves(numbers: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding of numbers (...), cosines first: (..., channels) fp32."""
    half = channels // 2
    frequency = torch.exp(torch.arange(half, device=numbers.device, dtype=torch.float32) * (-math.log(1e4) / half))
    angle = numbers.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Embedding(nn.Module):
    """Two linear layers: of the timestep's waves, and of what a UNet of Stable Diffusion XL is told beside the text."""

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(channels, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels), any float dtype -> (B, dim)."""
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class UNet(nn.Module):
    """The network.

    Args:
        config: The dense UNet.
        structure: What is kept of it; everything if None.
        align: Inner ResNet widths are stored padded to a multiple of this, at no change of the result.
    """

    def __init__(self, config: UNetConfig, structure: Structure | None = None, align: int = 1):
        super().__init__()
        self.config = config
        self.structure = structure or Structure.dense(config)
        assert self.structure.config == config, "the structure describes another UNet"
        channels, levels = config.block_out_channels, len(config.block_out_channels)
        last = levels - 1

        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = Embedding(channels[0], config.time_embed_dim)
        pooled, each = config.pooled_dim, config.addition_time_embed_dim or 0
        self.add_embedding = Embedding(pooled + SIZES * each, config.time_embed_dim) if pooled else None
        kept = self.structure
        self.down_blocks = nn.ModuleList(
            [DownBlock(f"down_blocks.{i}", kept, align, "downsamplers" if i < last else None) for i in range(levels)]
        )
        self.mid_block = MidBlock("mid_block", kept, align, None) if config.mid_block_type else None
        self.up_blocks = nn.ModuleList(
            [UpBlock(f"up_blocks.{i}", kept, align, "upsamplers" if i < last else None) for i in range(levels)]
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # an overload its stub lacks

    @property
    def recompute(self) -> bool:
        """Whether backward recomputes ResNets and Transformers: less memory, a third more time of forward."""
        return self.down_blocks[0].recompute  # pyright: ignore[reportReturnType]

    @recompute.setter
    def recompute(self, on: bool) -> None:
        for block in self.modules():
            if isinstance(block, Block):
                block.recompute = on

    def cut(self, structure: Structure, align: int = 1) -> "UNet":
        """A pruned copy of this dense UNet: the same weights, sliced; no memory is shared."""
        with torch.device("meta"):
            student = UNet(self.config, structure, align)
        return student.fill(structure.sliced(self.state_dict()), self.conv_in.weight.device)

    @torch.no_grad()
    def fill(self, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> "UNet":
        """Turn a UNet on the meta device into one with weights, all of its state dict, and return it.

        They are copied one by one as they come, whatever their dtype, device and memory format. Padding is zero.
        """
        self.to_empty(device=device)
        for module in self.modules():
            if isinstance(module, ResNet) and module.pad:
                module._zero_padding()
        places = self.state_dict()  # views of the parameters, without their padding
        for name, weight in weights:
            assert places[name].shape == weight.shape, name
            places.pop(name).copy_(weight)
        assert not places, f"{next(iter(places))} is missing"
        return self

    def forward(self, x: Tensor, t: Tensor, text: Tensor, run: Sites | None = None) -> Prediction:
        """Predict from a noisy batch, in the dtype of the parameters.

        Args:
            x: (B, C_in, H, W) noisy latents, any float dtype.
            t: (B,) timesteps.
            text: (B, L, D) text states, any float dtype; of Stable Diffusion XL (B, L + R, D), as
                `models.conditioning.pack` makes it.
            run: Computes the sites in place of their modules. Recomputed like them if `recompute` is set.

        Raises:
            UserError: `run` comes with a pruned UNet.
        """
        if run is not None and not self.structure.is_dense:
            raise UserError("wanted the dense UNet; this one is pruned")
        blocks: list[Tensor] = []
        dtype = self.conv_in.weight.dtype
        time = self.time_embedding(waves(t, self.config.block_out_channels[0]))
        if self.add_embedding is not None:
            text, extra = unpack(text, self.config.pooled_dim)
            time = time + self.add_embedding(self._told(extra))
        time, text = F.silu(time), text.to(dtype)
        h = self.conv_in(x.to(dtype, memory_format=torch.channels_last))
        skips = [h]
        for block in (*self.down_blocks, *([] if self.mid_block is None else [self.mid_block]), *self.up_blocks):
            h = block(h, time, text, skips, run)
            blocks.append(h)
        return Prediction(self.conv_out(group_norm_silu(h, self.conv_norm_out)), tuple(blocks))

    def _told(self, extra: Extra) -> Tensor:
        """(B, P + 6 E) of a pooled state (B, P) and six sizes, each as E waves."""
        each = self.config.addition_time_embed_dim
        assert each is not None
        return torch.cat([extra.pooled.float(), waves(extra.sizes, each).flatten(1)], dim=1)
