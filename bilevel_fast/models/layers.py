"""What the UNet of `models.unet` is built of: ResNets, Transformers and what changes the size between levels.

State-dict keys are those of diffusers. What pruning narrows or drops is in `models.architecture`: each layer takes its
site.

Legend: B batch, C channels, H W latent size, T = H*W image tokens, L text tokens, D text width, N heads.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bilevel_fast.models.architecture import Site, UNetConfig
from bilevel_fast.models.structure import Structure
from bilevel_fast.ops.dispatch import (
    Branch,
    add,
    add_norm,
    attention,
    feed_forward,
    geglu,
    group_norm_and_input,
    group_norm_silu,
    group_norm_silu_and_input,
    group_norm_silu_of_two,
    linear,
)
from bilevel_fast.ops.products import lay_together, products
from bilevel_fast.ops.shortcut import widened


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

    def forward(self, x: Tensor) -> Tensor | Branch:
        """x (B, T, C) -> (B, T, C), for `add`."""
        geglu, _, last = self.net
        return feed_forward(x, self.net, geglu.proj, last)  # pyright: ignore[reportArgumentType]


Attend = Callable[[str, Attention, Tensor, Tensor], Tensor | Branch]
"""("attn1" or "attn2", module, x (B, T, C), context (B, S, D)) -> (B, T, C)"""
Feed = Callable[[FeedForward, Tensor], Tensor | Branch]
"""(module, x (B, T, C)) -> (B, T, C)"""


def _attend(_: str, module: nn.Module, x: Tensor, context: Tensor) -> Tensor | Branch:
    return module(x, context)


def _feed(module: nn.Module, x: Tensor) -> Tensor | Branch:
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
        return add(h, feed(self.ff, n))


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
        h = linear(whole(h), self.proj_out) if self.linear else whole(h)
        if isinstance(h, Branch):
            return _to_image(add(_to_tokens(x), h), x)
        h = _to_image(h, x)
        return x + (h if self.linear else self.proj_out(h))


def whole(h: Tensor | Branch) -> Tensor:
    """What a Transformer hands its blocks, with the bias that may still be missing."""
    return h.whole() if isinstance(h, Branch) else h


def _to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) channels_last -> (B, T, C), a view."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _to_image(h: Tensor, x: Tensor) -> Tensor:
    """(B, T, C) -> (B, C, H, W) of x's size, channels_last, a view."""
    return h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Resample(nn.Module):
    """Holds `conv` under diffusers' key; stride 2 shrinks, stride 1 follows a nearest-neighbour enlargement."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(h)
