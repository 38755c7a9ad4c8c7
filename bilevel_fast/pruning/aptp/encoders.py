"""Captions to embeddings, which the router tells prompts apart by.

    text    the model's own text encoder: the mean of its states over the words of a prompt, minus a centre, which is
            the mean over the training prompts. Without it all prompts point the same way, whatever they say.
    mpnet   a sentence encoder in the layout of sentence-transformers, such as all-mpnet-base-v2: the mean of its last
            states over the words. APTP's choice (arXiv:2406.12042, section 3.2). Its length is left as it is.

Legend: B captions, N training prompts, L text tokens, D width of the embedding.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError, require
from bilevel_fast.base.files import parse_json, read_file, read_json, sha256
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.models.weights import DIGEST, check_report, find_weights, load_pretrained, mapped_weights

CHUNK = 64  # captions encoded at once

_MODULES = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_POOLING = "1_Pooling"
_OFFSET = 2  # MPNet counts positions from here


class PromptEncoder(Protocol):
    """A frozen encoder of captions."""

    @property
    def width(self) -> int:
        """D."""
        ...

    @property
    def centre(self) -> Tensor:
        """(D,) fp32 on the CPU: what is subtracted from every embedding."""
        ...

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Embeddings (B, D) fp32 on the encoder's device, without gradient; each depends on its own caption alone."""
        ...

    def describe(self) -> dict[str, Any]:
        """JSON values by which `open_encoder` finds the same encoder again, but for its centre."""
        ...


@runtime_checkable
class TellsWords(Protocol):
    """A text encoder that knows which tokens of a prompt are padding."""

    def mask(self, prompts: Sequence[str]) -> Tensor:
        """(B, L) bool: true where a token is not padding."""
        ...


class TextPrompts:
    """The kind `text`. Where the text encoder cannot tell words from padding, the mean is over all tokens.

    Args:
        encoder: Of a model folder.
        centre: (D,); None is zero.

    Raises:
        UserError: The centre has another width than the text encoder's states.
    """

    def __init__(self, encoder: TextEncoder, centre: Tensor | None = None) -> None:
        self.encoder = encoder
        self.centre = torch.zeros(encoder.width) if centre is None else centre.float().cpu()
        if self.centre.shape != (encoder.width,):
            came = tuple(self.centre.shape)
            raise UserError(f"the centre of the prompts has shape {came}, this text encoder wants ({encoder.width},)")

    @property
    def width(self) -> int:
        return self.encoder.width

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        states = self.encoder.encode(captions).float()
        words = self.encoder.mask(captions) if isinstance(self.encoder, TellsWords) else None
        return _mean(states, words) - self.centre.to(states.device)

    def describe(self) -> dict[str, Any]:
        return {"kind": "text"}


class MpnetPrompts:
    """The kind `mpnet`. `MpnetPrompts.load` makes one."""

    def __init__(self, folder: Path, model: Any, tokenizer: Any, length: int, digests: Sequence[str]) -> None:
        self.folder, self.model, self.tokenizer, self.length = folder, model, tokenizer, length
        decides = json.dumps([*digests, sorted(tokenizer.get_vocab().items()), length])
        self.fingerprint = hashlib.sha256(decides.encode()).hexdigest()[:DIGEST]
        self.centre = torch.zeros(self.width)

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> "MpnetPrompts":
        """Read a folder on this machine; the network is never asked.

        Raises:
            UserError: transformers is not installed, or the folder is no MPNet with mean pooling; says why.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"prompt encoder {folder} is no folder; wanted one in the layout of all-mpnet-base-v2")
        kind = read_json(folder / "config.json").get("model_type")
        if kind != "mpnet":
            raise UserError(f"{folder / 'config.json'}: model_type is {kind!r}, wanted 'mpnet'")
        pooled = _check_modules(folder)
        files = find_weights(folder, "model").files
        mapped_weights(folder, "model")  # transformers takes numbers that are none
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
            raise UserError(f"{folder / 'tokenizer.json'} is missing, and so is vocab.txt")
        transformers = require("transformers", "sd")
        logging = transformers.utils.logging
        logging.disable_progress_bar()
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns of weights that are of no use here, and of what is refused below
        try:
            model, report = load_pretrained(
                transformers.MPNetModel,
                folder,
                dtype=torch.float32,
                add_pooling_layer=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        finally:
            logging.set_verbosity(verbosity)
        unexpected = [name for name in report["unexpected_keys"] if not name.startswith("pooler.")]
        check_report(folder, {**report, "unexpected_keys": unexpected})
        config = model.config
        if pooled not in (None, config.hidden_size):
            raise UserError(f"{folder / _POOLING / 'config.json'} pools {pooled} wide states, {folder} makes "
                            f"{config.hidden_size} wide ones")  # fmt: skip
        tokenizer = load_pretrained(transformers.AutoTokenizer, folder)
        if len(tokenizer) > config.vocab_size:
            raise UserError(f"{folder} has {len(tokenizer)} tokens and embeddings for {config.vocab_size}")
        digests = [sha256(file) for file in files]
        return cls(folder, model.to(device).eval().requires_grad_(False), tokenizer, _length(folder, config), digests)

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.model.device)
        states = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return _mean(states.float(), tokens.attention_mask.bool())

    def describe(self) -> dict[str, Any]:
        return {"kind": "mpnet", "folder": str(self.folder.resolve()), "fingerprint": self.fingerprint}


def encode_all(encoder: PromptEncoder, captions: Sequence[str]) -> Tensor:
    """Embeddings of any number of captions, some at a time: (N, D) fp32 on the CPU."""
    return torch.cat([encoder.encode(captions[i : i + CHUNK]).cpu() for i in range(0, len(captions), CHUNK)])


def centred(encoder: PromptEncoder, prompts: Sequence[str]) -> tuple[PromptEncoder, Tensor]:
    """Centre an encoder of the kind `text` on the training prompts; another stays as it is.

    Args:
        encoder: With a centre of zero.
        prompts: N, at least one.

    Returns:
        The encoder to use from now on, and its embeddings of the prompts, (N, D).
    """
    embeddings = encode_all(encoder, prompts)
    if not isinstance(encoder, TextPrompts):
        return encoder, embeddings
    centre = embeddings.double().mean(dim=0).float()
    return TextPrompts(encoder.encoder, centre), embeddings - centre


def open_encoder(
    described: dict[str, Any], centre: Tensor, text_encoder: TextEncoder | None, folder: Path | None, device: Any
) -> PromptEncoder:
    """The encoder that `describe` told of.

    Args:
        described: What it said.
        centre: (D,).
        text_encoder: For the kind `text`.
        folder: Where the sentence encoder is now; None where it was.
        device: Of a sentence encoder.

    Raises:
        UserError: It is of an unknown kind, or not there any more, or another one.
    """
    match described:
        case {"kind": "text"} if folder is not None:
            raise UserError(f"--prompt-encoder {folder}: this router was trained with the model's own text encoder")
        case {"kind": "text"} if text_encoder is not None:
            return TextPrompts(text_encoder, centre)
        case {"kind": "mpnet", "folder": str(), "fingerprint": str()}:
            place = Path(described["folder"]) if folder is None else folder
            if folder is None and not place.is_dir():
                raise UserError(f"the prompt encoder is not in {place} any more; --prompt-encoder says where it is now")
            found = MpnetPrompts.load(place, device)
            wanted = described["fingerprint"]
            if found.fingerprint != wanted:
                raise UserError(f"{place} is another prompt encoder ({found.fingerprint}) than the router's ({wanted})")
            return found
    raise UserError(f"prompt encoder {described!r} is unknown; wanted the kind 'text' or 'mpnet'")


def _mean(states: Tensor, words: Tensor | None) -> Tensor:
    """(B, L, D) -> (B, D), over the words (B, L) or all tokens."""
    if words is None:
        return states.mean(dim=1)
    weight = words.to(states)[..., None]
    return (states * weight).sum(dim=1) / weight.sum(dim=1)


def _check_modules(folder: Path) -> int | None:
    """Refuse what is not a transformer and mean pooling; the width that is pooled, if it is said."""
    path = folder / "modules.json"
    try:
        modules = parse_json(read_file(path), str(path))
        found = [module["type"].rpartition(".")[2] for module in modules]
        pooling = modules[1]["path"] if len(modules) > 1 else None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is not a list of modules with a type and a path") from error
    if found not in _MODULES or pooling != _POOLING:
        raise UserError(f"{path} lists {', '.join(found) or 'nothing'}, wanted Transformer, then Pooling in {_POOLING}")
    config = folder / _POOLING / "config.json"
    fields = read_json(config)
    if "pooling_mode" in fields:  # as newer releases of sentence-transformers write it
        modes = fields["pooling_mode"]
        modes = [modes] if isinstance(modes, str) else modes
    else:
        start = "pooling_mode_"
        modes = [name.removeprefix(start) for name, on in fields.items() if name.startswith(start) and on]
    if modes not in (["mean"], ["mean_tokens"]):
        raise UserError(f"{config}: pooling is {modes!r}, wanted the mean over all tokens and nothing else")
    return fields.get("word_embedding_dimension", fields.get("embedding_dimension"))


def _length(folder: Path, config: Any) -> int:
    """Tokens that a caption is cut to."""
    most, path = config.max_position_embeddings - _OFFSET, folder / "sentence_bert_config.json"
    length = read_json(path).get("max_seq_length") if path.is_file() else None
    if length is None:
        return most
    if type(length) is not int or length < 3:
        raise UserError(f"{path}: max_seq_length is {length!r}, wanted a number of tokens")
    return min(length, most)
