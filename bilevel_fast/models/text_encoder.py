"""Prompts to text states: what every text encoder offers, and the CLIP text tower of Stable Diffusion.

Shape legend: B prompts, L text tokens (77 for CLIP), D text width.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError, require
from bilevel_fast.base.files import read_json
from bilevel_fast.base.limits import CHANNELS, LAYERS, MEMBERS, TOKENS
from bilevel_fast.models.weights import check_counts, check_report, find_weights, load_pretrained, mapped_weights

_AT_A_TIME = 64
_MOST = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "projection_dim", "num_attention_heads"), CHANNELS),
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": TOKENS,
    "vocab_size": MEMBERS,
}


class TextEncoder(Protocol):
    """A frozen text encoder."""

    @property
    def width(self) -> int:
        """D."""
        ...

    @property
    def length(self) -> int:
        """L: every prompt is padded or cut to it."""
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """States (B, L, D) fp32 of prompts, without gradient; "" is the null prompt."""
        ...

    def mask(self, prompts: Sequence[str]) -> Tensor:
        """(B, L) bool on the CPU: true from the token that begins a prompt to the one that ends it."""
        ...


def indistinct(encoder: TextEncoder, texts: Sequence[str], others: Sequence[str]) -> list[int]:
    """Which of some pairs of texts have the same states to the bit: to the model they are one text.

    So it is where they differ behind the last token that is read, or in what a tokenizer drops. Texts of different
    lengths are not encoded for it.
    """
    found: list[int] = []
    for start in range(0, len(texts), _AT_A_TIME):
        stop = min(start + _AT_A_TIME, len(texts))
        equal = (encoder.mask(texts[start:stop]) == encoder.mask(others[start:stop])).all(1).nonzero().flatten()
        rows: list[int] = [start + row for row in equal.tolist()]
        if rows:
            one, other = (encoder.encode([side[row] for row in rows]) for side in (texts, others))
            found += [row for row, a, b in zip(rows, one, other, strict=True) if torch.equal(a, b)]
    return found


class ClipTextEncoder:
    """`CLIPTextModel` and `CLIPTokenizer` of transformers, as Stable Diffusion uses them.

    States are the last hidden states after the final LayerNorm (OpenCLIP-H's tower for SD 2.1, ViT-L/14's for SD 1.x).
    Padding is not masked: the base model was trained to read it.
    """

    _one = threading.Lock()
    """Both levels' loaders encode, and a tokenizer keeps its padding in itself: two threads at once are refused."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def load(
        cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "ClipTextEncoder":
        """Read `text_encoder/` and `tokenizer/` of a model folder; the network is never asked.

        Raises:
            UserError: transformers is not installed, or a file is missing, broken or does not fit the config.
        """
        transformers = require("transformers", "sd")
        transformers.utils.logging.disable_progress_bar()  # loading takes a second; the training has the terminal
        part, words = folder / "text_encoder", folder / "tokenizer"
        check_counts(part, read_json(part / "config.json"), _MOST)
        variant = find_weights(part, "model").variant
        mapped_weights(part, "model")  # transformers takes numbers that are none
        if not (words / "tokenizer.json").is_file():
            for name in ("vocab.json", "merges.txt"):
                if not (words / name).is_file():
                    raise UserError(f"{words / name} is missing")
        model, report = load_pretrained(
            transformers.CLIPTextModel,
            part,
            dtype=dtype,
            variant=variant,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = load_pretrained(transformers.CLIPTokenizer, words)
        check_report(part, report)
        if len(tokenizer) > model.config.vocab_size:
            raise UserError(f"{words} has {len(tokenizer)} tokens, {part} has embeddings for {model.config.vocab_size}")
        return cls(model.to(device).eval().requires_grad_(False), tokenizer)

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def length(self) -> int:
        return self.model.config.max_position_embeddings

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """States (B, L, D) fp32 on the device of the encoder; longer prompts are cut."""
        return self.model(self._tokens(prompts).input_ids.to(self.model.device)).last_hidden_state.float()

    def mask(self, prompts: Sequence[str]) -> Tensor:
        """(B, L) bool on the CPU: true from the token that begins a prompt to the one that ends it."""
        return self._tokens(prompts).attention_mask.bool()

    def _tokens(self, prompts: Sequence[str]) -> Any:
        with self._one:
            return self.tokenizer(
                list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
            )
