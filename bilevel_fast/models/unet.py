"""The Stable Diffusion UNet, teacher and student alike: built from a config and a Structure.

    prediction = UNet(config, structure)(x, t, text)

State-dict keys and shapes are those of diffusers' `UNet2DConditionModel` (narrower where pruned), so weights load
unchanged in both directions. The forward pass *returns* the block outputs that distillation compares; there are no
hooks; whoever wants another ResNet or Transformer passes `Sites`. Activations are channels_last throughout: a
Transformer sees (B, H*W, C) without a copy.

Legend: B batch, C channels, H W latent size, T = H*W image tokens, L text tokens, D text width, N heads.
"""

import math
from collections.abc import Callable, Iterable
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
from bilevel_fast.models.layers import Dropped, Resample, ResNet, Transformer
from bilevel_fast.models.structure import Structure
from bilevel_fast.ops.dispatch import (
    group_norm_silu,
)


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
