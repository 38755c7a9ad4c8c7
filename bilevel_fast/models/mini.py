"""What the mini model family has in place of Stable Diffusion's text encoder and VAE.

    WordTokenizer       words to ids, by a fixed list
    MiniTextEncoder     ids to states: a small transformer, trained together with the UNet
    PixelUnshuffleVAE   images to latents and back: pixel unshuffle, which is exact

Shapes: B prompts or images, L tokens (always `WordTokenizer.length`), D text width, N heads, H W size of an image.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.files import read_json, whole, write_atomic, write_json
from bilevel_fast.base.limits import CHANNELS, LAYERS, TOKENS
from bilevel_fast.models.text_encoder import framed, replaced
from bilevel_fast.models.weights import check_names, read_weights

_SPECIAL = ("<bos>", "<eos>", "<pad>")
_BOS, _EOS, _PAD = range(len(_SPECIAL))
_LOGVAR = -30.0  # a standard deviation of 3e-7: sampling the posterior gives its mean


@dataclass(frozen=True)
class WordTokenizer:
    """Words to ids, by a fixed list. Case and spacing do not matter."""

    words: tuple[str, ...]
    length: int = 12
    """Tokens of every prompt, with the begin and end tokens and padding."""

    @property
    def size(self) -> int:
        """How many ids there are."""
        return len(_SPECIAL) + len(self.words)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, L) int64: begin, words, end, padding. "" is a prompt without words.

        Raises:
            UserError: A prompt has words that the list lacks, or too many words.
        """
        return torch.tensor([self._ids(prompt) for prompt in prompts], dtype=torch.int64).reshape(-1, self.length)

    def _ids(self, prompt: str) -> list[int]:
        ids = {word: i for i, word in enumerate(self.words, start=len(_SPECIAL))}
        words = prompt.lower().split()
        if unknown := [word for word in dict.fromkeys(words) if word not in ids]:
            hints = " ".join(f"{word!r}{nearest(word, self.words)}" for word in unknown)
            raise UserError(f"prompt {prompt!r}: the mini world has no word for {hints}")
        if len(words) > self.length - 2:
            raise UserError(f"prompt {prompt!r} has {len(words)} words; the mini world takes {self.length - 2}")
        tokens = [_BOS, *(ids[word] for word in words), _EOS]
        return tokens + [_PAD] * (self.length - len(tokens))

    def save(self, folder: Path) -> None:
        """Write `folder/vocab.json`: every token with its id, and the prompt length."""
        folder.mkdir(parents=True, exist_ok=True)
        vocab = {token: i for i, token in enumerate(_SPECIAL + self.words)}
        write_json(folder / "vocab.json", {"_class_name": type(self).__name__, "length": self.length, "vocab": vocab})

    @classmethod
    def load(cls, folder: Path) -> "WordTokenizer":
        """Read what `save` wrote.

        Raises:
            UserError: `folder/vocab.json` is missing or is not a word list.
        """
        content = _read(folder / "vocab.json", cls.__name__)
        try:
            length = whole(content["length"], f"{folder / 'vocab.json'}: length", 3, TOKENS)
            if any(type(number) is not int for number in content["vocab"].values()):
                raise TypeError("an id is no whole number")
            tokens = sorted(content["vocab"], key=content["vocab"].__getitem__)
            if tuple(tokens[: len(_SPECIAL)]) != _SPECIAL:
                raise UserError(f"{folder / 'vocab.json'}: ids 0 to 2 must be {', '.join(_SPECIAL)}")
            return cls(tuple(tokens[len(_SPECIAL) :]), length)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / 'vocab.json'} is not a word list: {error}") from error


class _Layer(nn.Module):
    """Pre-norm transformer layer; every token sees every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, N, L, K)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class MiniTextEncoder(nn.Module):
    """A small bidirectional transformer over the words of a prompt, trained together with the UNet."""

    def __init__(self, tokenizer: WordTokenizer, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokenizer, self.width, self.heads = tokenizer, width, heads
        self.token = nn.Embedding(tokenizer.size, width)
        self.position = nn.Parameter(torch.randn(tokenizer.length, width) * 0.1)
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    @property
    def length(self) -> int:
        """Tokens of every prompt."""
        return self.tokenizer.length

    @property
    def pooled(self) -> int:
        return 0

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) int64 to states (B, L, D)."""
        return self._states(self.token(ids))

    def _states(self, embedded: Tensor) -> Tensor:
        h = embedded + self.position
        for layer in self.layers:
            h = layer(h)
        return self.norm(h)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """States (B, L, D) fp32 of prompts, without gradient.

        Raises:
            UserError: A prompt has unknown words, or too many.
        """
        return self(self.tokenizer(prompts).to(self.position.device)).float()

    def mask(self, prompts: Sequence[str]) -> Tensor:
        """(B, L) bool on the CPU: true from the token that begins a prompt to the one that ends it.

        Raises:
            UserError: As `encode`.
        """
        return self.tokenizer(prompts) != _PAD

    @property
    def vocabulary(self) -> int:
        """V, how many ids there are."""
        return self.tokenizer.size

    def free(self) -> Tensor:
        """(F,) int64 on the CPU, rising: the ids of words."""
        return torch.arange(len(_SPECIAL), self.vocabulary)

    def tokens_of(self, text: str) -> list[int]:
        """Ids of a text's words.

        Raises:
            UserError: It has unknown words, or too many.
        """
        return [token for token in self.tokenizer([text])[0].tolist() if token >= len(_SPECIAL)]

    def text_of(self, tokens: Sequence[int]) -> str:
        return " ".join(self.tokenizer.words[token - len(_SPECIAL)] for token in tokens)

    def read(self, tokens: Sequence[Sequence[int]], mixed: Tensor | None = None) -> Tensor:
        """States (B, L, D) fp32 of texts given as tokens, with gradient: see `text_encoder.TokenReader`."""
        ids = framed(tokens, (_BOS, _EOS, _PAD), self.length).to(self.position.device)
        return self._states(replaced(self.token(ids), mixed, self.token.weight)).float()

    def save(self, folder: Path) -> None:
        """Write `text_encoder/` and `tokenizer/` of a model folder. Weights in fp16."""
        self.tokenizer.save(folder / "tokenizer")
        part = folder / "text_encoder"
        part.mkdir(parents=True, exist_ok=True)
        config = {
            "_class_name": type(self).__name__,
            "width": self.width,
            "layers": len(self.layers),
            "heads": self.heads,
        }
        write_json(part / "config.json", config)
        weights = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        write_atomic(part / "model.safetensors", save(weights, metadata={"format": "pt"}))

    @classmethod
    def load(cls, folder: Path) -> "MiniTextEncoder":
        """Read what `save` wrote into a model folder: fp32, in eval mode, without gradients.

        Raises:
            UserError: A file is missing or does not fit the config.
        """
        part = folder / "text_encoder"
        config = _read(part / "config.json", cls.__name__)
        weights = read_weights(part, "model")
        tokenizer = WordTokenizer.load(folder / "tokenizer")
        try:
            where = f"{part / 'config.json'}: "
            layers = whole(config["layers"], f"{where}layers", 1, LAYERS)
            width, heads = (whole(config[name], where + name, 1, CHANNELS) for name in ("width", "heads"))
            if width % heads:
                raise UserError(f"{where}width {width} is no multiple of heads {heads}")
            with torch.device("meta"):  # nothing is made room for before the weights are known to fit
                encoder = cls(tokenizer, width, layers, heads)
            check_names(str(part), weights, encoder.state_dict())
            encoder.load_state_dict(weights, assign=True)
        except KeyError as error:
            raise UserError(f"{part / 'config.json'}: {error} is missing") from error
        except RuntimeError as error:
            raise UserError(f"{part}: {' '.join(str(error).split())}") from error
        return encoder.eval().requires_grad_(False)


@dataclass(frozen=True)
class PixelUnshuffleVAE:
    """Images (B, 3, H, W) in [-1, 1] to latents (B, 12, H/2, W/2) and back, with the interface of a real VAE.

    Latents are what the UNet sees: `(z - shift_factor) * scaling_factor`, where z are the unshuffled pixels.
    """

    scaling_factor: float = 2.13
    shift_factor: float = 0.66
    """With the scaling, measured on the drawn world: latents have mean 0 and standard deviation 1."""
    block: int = 2
    """Side of the square of pixels that becomes one latent position."""

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return 3 * self.block**2

    def moments(self, images: Tensor) -> Tensor:
        """Posterior mean and log variance of scaled latents: (B, 3, H, W) to (B, 2 * channels, H/2, W/2)."""
        mean = (F.pixel_unshuffle(images, self.block) - self.shift_factor) * self.scaling_factor
        return torch.cat([mean, torch.full_like(mean, _LOGVAR)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) of scaled latents (B, channels, H/2, W/2), clamped to [-1, 1]."""
        return F.pixel_shuffle(latents / self.scaling_factor + self.shift_factor, self.block).clamp(-1, 1)

    def save(self, folder: Path) -> None:
        """Write `folder/config.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"_class_name": type(self).__name__, **asdict(self)})

    @classmethod
    def load(cls, folder: Path) -> "PixelUnshuffleVAE":
        """Read what `save` wrote.

        Raises:
            UserError: `folder/config.json` is missing or describes something else.
        """
        path = folder / "config.json"
        config = _read(path, cls.__name__)
        try:
            scale, shift = float(config["scaling_factor"]), float(config["shift_factor"])
            if not (math.isfinite(scale) and scale and math.isfinite(shift)):
                raise UserError(f"scaling_factor {scale} and shift_factor {shift} must be finite, the first not 0")
            return cls(scale, shift, whole(config["block"], "block", 1, 64))
        except KeyError as error:
            raise UserError(f"{path}: {error} is missing") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{path}: {error}") from error


def _read(path: Path, kind: str) -> dict[str, Any]:
    content = read_json(path)
    if content.get("_class_name") != kind:
        raise UserError(f"{path}: _class_name is {content.get('_class_name')!r}, wanted {kind!r}")
    return content
