"""Prompts to text states: what every text encoder offers, and the CLIP text tower of Stable Diffusion.

What a text encoder gives is the text tensor of `models.conditioning`: for most models that is the states alone.

Shape legend: B prompts, L text tokens (77 for CLIP), D text width, R further rows (0 but for Stable Diffusion XL).
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

    @property
    def pooled(self) -> int:
        """P, the width of the pooled state behind the states; 0 where there is none, and so no further rows."""
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text tensor (B, L + R, D) fp32 of prompts, without gradient; "" is the null prompt."""
        ...

    def mask(self, prompts: Sequence[str]) -> Tensor:
        """(B, L + R) bool on the CPU: true from the token that begins a prompt to the one that ends it."""
        ...


class TokenReader(TextEncoder, Protocol):
    """A text encoder that a search over tokens can work on, as those of all families are.

    Tokens are the ids of a text without what begins, ends and pads it; a text has at most L - 2.
    """

    @property
    def vocabulary(self) -> int:
        """V, how many ids there are."""
        ...

    def free(self) -> Tensor:
        """(F,) int64 on the CPU, rising: the ids that a text can be made of."""
        ...

    def tokens_of(self, text: str) -> list[int]:
        """What the encoder makes of a text; a longer one is cut, or refused where `encode` refuses it."""
        ...

    def text_of(self, tokens: Sequence[int]) -> str:
        """A text of some tokens. Pieces of words may join in it, and then it is read as other tokens."""
        ...

    def read(self, tokens: Sequence[Sequence[int]], mixed: Tensor | None = None) -> Tensor:
        """Text tensor (B, L + R, D) fp32 of B texts, as `encode` gives it, with gradient.

        Args:
            tokens: Of each text.
            mixed: (B, k, V) fp32: in place of the embeddings of each text's first k tokens, mixtures of all of them.

        Raises:
            UserError: A text has more than L - 2 tokens.
        """
        ...


def token_reader(encoder: TextEncoder) -> TokenReader:
    """The encoder itself, where it is one.

    Raises:
        UserError: It reads texts alone.
    """
    if not hasattr(encoder, "read"):
        raise UserError(f"{type(encoder).__name__} reads texts alone; a search over tokens wants one that reads tokens")
    return encoder  # pyright: ignore[reportReturnType]


def framed(tokens: Sequence[Sequence[int]], ends: tuple[int, int, int], length: int) -> Tensor:
    """Ids (B, L) int64 of texts: begin, tokens, end, padding, of which `ends` has the ids.

    Raises:
        UserError: A text has more than L - 2 tokens.
    """
    begin, end, pad = ends
    if (longest := max(map(len, tokens), default=0)) > length - 2:
        raise UserError(f"a text has {longest} tokens; the text encoder takes {length - 2}")
    rows = [[begin, *some, end, *[pad] * (length - 2 - len(some))] for some in tokens]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, length)


def replaced(embedded: Tensor, mixed: Tensor | None, table: Tensor) -> Tensor:
    """Embeddings (B, L, D) with mixtures (B, k, V) of the table's rows (V, D) in those behind the first."""
    if mixed is None:
        return embedded
    inside = mixed.to(table) @ table
    return torch.cat([embedded[:, :1], inside, embedded[:, 1 + inside.shape[1] :]], dim=1)


def token_states(encoder: TextEncoder, texts: Sequence[str]) -> Tensor:
    """(B, L, D) fp32: what the tokens of texts say, for those who look at or change tokens; no further rows.

    Here "" is a text without words, also to an encoder whose null prompt is none (`XlTextEncoder`).
    """
    return encoder.encode([text or " " for text in texts])[:, : encoder.length]


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
        return cls(*load_clip("CLIPTextModel", folder / "text_encoder", folder / "tokenizer", device, dtype))

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def length(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def pooled(self) -> int:
        return 0

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """States (B, L, D) fp32 on the device of the encoder; longer prompts are cut."""
        return self.model(self.tokens(prompts).input_ids.to(self.model.device)).last_hidden_state.float()

    def mask(self, prompts: Sequence[str]) -> Tensor:
        """(B, L) bool on the CPU: true from the token that begins a prompt to the one that ends it."""
        return self.tokens(prompts).attention_mask.bool()

    @property
    def vocabulary(self) -> int:
        """V, the rows of the table of embeddings, of which the tokenizer may know fewer."""
        return self.model.config.vocab_size

    def free(self) -> Tensor:
        """(F,) int64 on the CPU, rising: every id of the tokenizer but those that begin, end and pad."""
        return torch.tensor(sorted(set(self.tokenizer.get_vocab().values()) - set(self.tokenizer.all_special_ids)))

    def tokens_of(self, text: str) -> list[int]:
        """Ids of a text; a longer one is cut."""
        found = self.tokens([text])
        return found.input_ids[0, 1 : int(found.attention_mask[0].sum()) - 1].tolist()

    def text_of(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens)).strip()

    def read(self, tokens: Sequence[Sequence[int]], mixed: Tensor | None = None) -> Tensor:
        """States (B, L, D) fp32 of texts given as tokens, with gradient: see `TokenReader`."""
        return self.run(tokens, mixed).last_hidden_state.float()

    def run(self, tokens: Sequence[Sequence[int]], mixed: Tensor | None, **asked: Any) -> Any:
        """What the tower answers to `tokens` and `mixed` of `read`; `asked` goes to it.

        The tower takes ids alone, and from them knows where a text ends: mixtures are put in behind its table.
        """
        ends = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        ids, table = framed(tokens, ends, self.length), self.model.get_input_embeddings()
        hook = table.register_forward_hook(lambda module, _, out: replaced(out, mixed, module.weight))
        try:
            return self.model(ids.to(self.model.device), **asked)
        finally:
            hook.remove()

    def tokens(self, prompts: Sequence[str]) -> Any:
        """What the tokenizer makes of prompts: `input_ids` and `attention_mask`, (B, L) int64 on the CPU."""
        with self._one:
            return self.tokenizer(
                list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
            )


def load_clip(kind: str, part: Path, words: Path, device: torch.device | str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A frozen CLIP text tower and its tokenizer, from two folders of a model; the network is never asked.

    Args:
        kind: Its class in transformers.
        part, words: Folders of the tower and of the tokenizer.
        device, dtype: Of the tower.

    Raises:
        UserError: transformers is not installed, or a file is missing, broken or does not fit the config.
    """
    transformers = require("transformers", "sd")
    transformers.utils.logging.disable_progress_bar()  # loading takes a second; the training has the terminal
    check_counts(part, read_json(part / "config.json"), _MOST)
    variant = find_weights(part, "model").variant
    mapped_weights(part, "model")  # transformers takes numbers that are none
    if not (words / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (words / name).is_file():
                raise UserError(f"{words / name} is missing")
    model, report = load_pretrained(
        getattr(transformers, kind),
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
    return model.to(device).eval().requires_grad_(False), tokenizer
