"""Stable Diffusion XL (arXiv:2307.01952): its two text encoders as one.

Shape legend: B prompts, L text tokens (77), D = D_1 + D_2 width of the states, P width of the pooled state, R further
rows (`models.conditioning`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json, whole
from bilevel_fast.base.limits import CHANNELS, LATENTS, SIDE
from bilevel_fast.models.conditioning import extra_rows, pack
from bilevel_fast.models.text_encoder import ClipTextEncoder, load_clip
from bilevel_fast.models.weights import check_counts


class XlTextEncoder:
    """Both CLIP towers of Stable Diffusion XL and the rows that the text tensor has behind their states.

    States are those before the last layer of each tower, side by side; the pooled state is the second tower's,
    projected. The size numbers are those of a picture of the model's own size, not cropped: sampling, edits and concept
    banks want them, and training puts those of its pictures in their place. Padding is not masked.

    Args:
        first, second: The towers with their tokenizers; the second one projects.
        zeros: Whether the null prompt "" has states and a pooled state of zeros, as `force_zeros_for_empty_prompt` of
            `model_index.json` says. Any other text without words is read.
        side: Height and width in pixels that the model was made for.
    """

    def __init__(self, first: ClipTextEncoder, second: ClipTextEncoder, zeros: bool, side: int) -> None:
        self.first, self.second, self.zeros, self.side = first, second, zeros, side

    @classmethod
    def load(
        cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "XlTextEncoder":
        """Read `text_encoder/`, `text_encoder_2/` and their tokenizers; the network is never asked.

        Raises:
            UserError: transformers is not installed, a file is missing, broken or does not fit the config, or the
                towers do not fit each other.
        """
        zeros = read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", True)
        if type(zeros) is not bool:
            raise UserError(f"{folder / 'model_index.json'}: force_zeros_for_empty_prompt is {zeros!r}, wanted a bool")
        parts = {"CLIPTextModel": "", "CLIPTextModelWithProjection": "_2"}
        first, second = (
            ClipTextEncoder(*load_clip(kind, folder / f"text_encoder{end}", folder / f"tokenizer{end}", device, dtype))
            for kind, end in parts.items()
        )
        if first.length != second.length:
            raise UserError(f"{folder}: text_encoder reads {first.length} tokens, text_encoder_2 {second.length}")
        return cls(first, second, zeros, native_side(folder))

    @property
    def width(self) -> int:
        return self.first.width + self.second.width

    @property
    def length(self) -> int:
        return self.first.length

    @property
    def pooled(self) -> int:
        return self.second.model.config.projection_dim

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text tensor (B, L + R, D) fp32 on the device of the towers; longer prompts are cut."""
        one, two = (
            tower.model(tower.tokens(prompts).input_ids.to(tower.model.device), output_hidden_states=True)
            for tower in (self.first, self.second)
        )
        return self._packed(one, two, [self.zeros and prompt == "" for prompt in prompts])

    @property
    def vocabulary(self) -> int:
        """V, that of both towers.

        Raises:
            UserError: The tokenizers have different ids for the same pieces of text.
        """
        if self.first.tokenizer.get_vocab() != self.second.tokenizer.get_vocab():
            raise UserError("the text encoders have two vocabularies; a search over tokens wants one")
        return self.first.vocabulary

    def free(self) -> Tensor:
        """(F,) int64 on the CPU, rising: the ids that a text can be made of, in both towers."""
        one, two = self.first.free(), self.second.free()
        return one[torch.isin(one, two)]

    def tokens_of(self, text: str) -> list[int]:
        return self.first.tokens_of(text)

    def text_of(self, tokens: Sequence[int]) -> str:
        return self.first.text_of(tokens)

    def read(self, tokens: Sequence[Sequence[int]], mixed: Tensor | None = None) -> Tensor:
        """Text tensor (B, L + R, D) fp32 of texts given as tokens, with gradient: see `TokenReader`."""
        one, two = (tower.run(tokens, mixed, output_hidden_states=True) for tower in (self.first, self.second))
        return self._packed(one, two, [False] * len(tokens))

    def _packed(self, one: Any, two: Any, null: Sequence[bool]) -> Tensor:
        """Of the answers of both towers; zeros for `null` texts."""
        states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1).float()
        pooled = two.text_embeds.float()
        if any(null):
            rows = torch.tensor(null, device=states.device)
            states, pooled = states.masked_fill(rows[:, None, None], 0), pooled.masked_fill(rows[:, None], 0)
        sizes = torch.tensor([[self.side, self.side, 0, 0, self.side, self.side]], dtype=torch.float32)
        return pack(states, pooled, sizes.expand(len(states), -1))

    def mask(self, prompts: Sequence[str]) -> Tensor:
        """(B, L + R) bool on the CPU: true from the token that begins a prompt to the one that ends it."""
        words = self.first.mask(prompts)
        return torch.cat([words, words.new_zeros(len(words), extra_rows(self.width, self.pooled))], dim=1)


def native_side(folder: Path) -> int:
    """Height and width in pixels that the model of a folder was made for.

    Raises:
        UserError: A config is missing or says what nobody can build.
    """
    unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
    check_counts(folder / "vae", vae, {"block_out_channels": CHANNELS})
    levels = vae.get("block_out_channels")
    latent = whole(unet.get("sample_size"), f"{folder / 'unet' / 'config.json'}: sample_size", 1, LATENTS)
    side = latent * 2 ** (len(levels) - 1 if isinstance(levels, list) else 0)
    return whole(side, f"{folder}: the side of its pictures in pixels", 1, SIDE)
