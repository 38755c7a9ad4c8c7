"""The three networks of a model as functions of tensors alone, for graphs: what one returns, the next one takes.

text_encoder   input_ids (B, L), of XL input_ids_2 as well -> encoder_hidden_states (B, L, D), of XL text_embeds
unet           sample (B, C, h, w), timestep (B,), encoder_hidden_states, of XL text_embeds (B, P) and time_ids
               (B, 6) -> out_sample (B, C, h, w)
vae_decoder    sample -> image (B, 3, H, W) in [-1, 1]; latents as the UNet sees them
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_fast.models.autoencoder import KLAutoencoder
from bilevel_fast.models.conditioning import pack
from bilevel_fast.models.folder import ModelFolder
from bilevel_fast.models.mini import MiniTextEncoder
from bilevel_fast.models.text_encoder import ClipTextEncoder
from bilevel_fast.models.text_encoder_xl import XlTextEncoder
from bilevel_fast.models.unet import UNet

BATCH, HEIGHT, WIDTH = "batch", "height", "width"


@dataclass(frozen=True)
class Part:
    """One network.

    Attributes:
        name: Of its file.
        module: Called with the inputs in order, fp32 on the CPU; returns a tensor or a tuple of them.
        inputs: The names of what goes in, in order, each with the names of its axes that are free.
        outputs: The names of what comes out, in order.
        example: (batch, height, width) of latents to inputs.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Mapping[int, str]]
    outputs: Sequence[str]
    example: Callable[[int, int, int], tuple[Tensor, ...]]

    @property
    def signature(self) -> str:
        """What goes in and what comes out, in one line."""
        return f"{', '.join(self.inputs)} -> {', '.join(self.outputs)}"


def parts(folder: ModelFolder) -> list[Part]:
    """The networks of a model folder."""
    return [_unet(folder), _text_encoder(folder), _vae_decoder(folder)]


class _Unet(nn.Module):
    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.unet(sample, timestep, encoder_hidden_states).out


class _UnetXl(nn.Module):
    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
    ) -> Tensor:
        return self.unet(sample, timestep, pack(encoder_hidden_states, text_embeds, time_ids)).out


def _unet(folder: ModelFolder) -> Part:
    config, tokens = folder.config, folder.text_encoder.length

    def example(batch: int, height: int, width: int) -> tuple[Tensor, ...]:
        given = [torch.randn(batch, config.in_channels, height, width), torch.randint(0, 1000, (batch,))]
        given.append(torch.randn(batch, tokens, config.cross_attention_dim))
        if config.pooled_dim:
            given += [torch.randn(batch, config.pooled_dim), torch.full((batch, 6), 64.0)]
        return tuple(given)

    free = {0: BATCH}
    inputs = {"sample": {0: BATCH, 2: HEIGHT, 3: WIDTH}, "timestep": free, "encoder_hidden_states": free}
    more = {"text_embeds": free, "time_ids": free} if config.pooled_dim else {}
    kind = _UnetXl if config.pooled_dim else _Unet
    return Part("unet", kind(folder.unet()), inputs | more, ("out_sample",), example)


class _Clip(nn.Module):
    def __init__(self, encoder: ClipTextEncoder) -> None:
        super().__init__()
        self.model = encoder.model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids).last_hidden_state


class _ClipXl(nn.Module):
    def __init__(self, encoder: XlTextEncoder) -> None:
        super().__init__()
        self.first, self.second = encoder.first.model, encoder.second.model

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        one = self.first(input_ids, output_hidden_states=True)
        two = self.second(input_ids_2, output_hidden_states=True)
        return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1), two.text_embeds


def _text_encoder(folder: ModelFolder) -> Part:
    encoder: Any = folder.text_encoder
    words = ("a photo of a house", "", "a star", "a red star")

    def example(batch: int, *_: int) -> tuple[Tensor, ...]:
        texts = [words[n % len(words)] for n in range(batch)]
        if isinstance(encoder, MiniTextEncoder):
            return (encoder.tokenizer(["" if "house" in text else text for text in texts]),)
        towers = [encoder.first, encoder.second] if isinstance(encoder, XlTextEncoder) else [encoder]
        return tuple(tower.tokens(texts).input_ids for tower in towers)

    free, states = {0: BATCH}, "encoder_hidden_states"
    if isinstance(encoder, XlTextEncoder):
        inputs = {"input_ids": free, "input_ids_2": free}
        return Part("text_encoder", _ClipXl(encoder), inputs, (states, "text_embeds"), example)
    module = encoder if isinstance(encoder, MiniTextEncoder) else _Clip(encoder)
    return Part("text_encoder", module, {"input_ids": free}, (states,), example)


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.model = vae.model if isinstance(vae, KLAutoencoder) else None  # its weights are this module's

    def forward(self, sample: Tensor) -> Tensor:
        return self.vae.decode(sample)


def _vae_decoder(folder: ModelFolder) -> Part:
    def example(batch: int, height: int, width: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, folder.vae.channels, height, width),)

    free = {0: BATCH, 2: HEIGHT, 3: WIDTH}
    return Part("vae_decoder", _Decoder(folder.vae), {"sample": free}, ("image",), example)
