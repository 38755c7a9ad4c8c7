"""CLIP score: 100 cos(E_I(image), E_T(prompt)), the mean over images.

On COCO it says how well an image shows its caption (higher is better); on prompts that name an artist, how much of the
artist is left (lower is better). Networks are open_clip's, weights a local file:

    OpenAI's own files (ViT-B-32.pt, as downloaded): the architecture is read off the shapes; QuickGELU
    any other: an open_clip state dict or safetensors, and the name of its architecture

Shape legend: N images or prompts, D features. Everything is computed in fp32; OpenAI's files hold half precision.

Source: CLIPScore, arXiv:2104.08718, without its factor 2.5 and its floor at 0, as the tables of arXiv:2412.15341.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from bilevel_fast.base.errors import UserError, nearest, require
from bilevel_fast.base.pickles import is_torchscript
from bilevel_fast.metrics.checkpoints import fit, read_checkpoint, tensors_of
from bilevel_fast.metrics.images import USUAL, Batching, open_rgb

_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # numbers among the tensors of OpenAI's archives


class ClipScorer:
    """Images and prompts to unit vectors. `load` makes one."""

    def __init__(self, model: Any, transform: Callable[..., Any], tokenize: Callable[..., Tensor], batching: Batching):
        self.model, self.transform, self.tokenize = model.eval().requires_grad_(False), transform, tokenize
        self.batching = batching

    @classmethod
    def load(
        cls,
        path: Path,
        name: str | None = None,
        *,
        device: str | torch.device = "cpu",
        batching: Batching = USUAL,
    ) -> "ClipScorer":
        """Read weights.

        Args:
            path: The file.
            name: Of an architecture of open_clip; None for OpenAI's own files only.
            batching: How many images or prompts are read at a time.

        Raises:
            UserError: open_clip is not installed, the file is missing or damaged, or of another architecture; or the
                name is none of open_clip's.
        """
        path = Path(path)
        open_clip = require("open_clip", "metrics")
        from open_clip.model import get_model_preprocess_cfg
        from open_clip.transform import PreprocessCfg, image_transform_v2

        known = open_clip.list_models()
        if name is not None and name not in known:
            raise UserError(f"open_clip has no architecture {name!r}{nearest(name, known)}")
        held = read_checkpoint(path)
        state = tensors_of(held, "state_dict")
        if name is None:
            if not (is_torchscript(path) or set(_NOT_WEIGHTS) & set(held)):
                raise UserError(f"weights {path} are not OpenAI's own file; name their architecture with --clip-model")
            model, tokenizer = _openai(state, path), open_clip.SimpleTokenizer()
            tokenizer.context_length = model.context_length
        else:
            if "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]:
                raise UserError(f"{name} takes its text tower from the network; wanted one that a file holds whole")
            model = open_clip.create_model(name, load_weights=False, pretrained_text=False)
            fit(model, _without_counts(state), path, name)
            tokenizer = open_clip.get_tokenizer(name)
        how = get_model_preprocess_cfg(model)
        transform = image_transform_v2(PreprocessCfg(**how), is_train=False)
        return cls(model.float().to(device), cast(Any, transform), tokenizer, batching)

    @torch.inference_mode()
    def images(self, files: Sequence[Path]) -> Tensor:
        """(N, D) fp32 unit vectors on the CPU.

        Raises:
            UserError: A file is missing or no whole picture.
        """
        parts = self.batching.measured(
            files,
            lambda file: self.transform(open_rgb(file)),
            lambda pixels: self.model.encode_image(torch.stack(pixels).to(self._device)),
            "CLIP",
        )
        return normalize(torch.cat(list(parts)).float(), dim=1)

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(N, D) fp32 unit vectors on the CPU; what is longer than CLIP's context is cut."""
        parts = [
            self.model.encode_text(self.tokenize(list(prompts[start : start + self.batching.size])).to(self._device))
            for start in range(0, len(prompts), self.batching.size)
        ]
        return normalize(torch.cat(parts).float(), dim=1).cpu()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def clip_scores(texts: Tensor, images: Tensor) -> NDArray[np.float64]:
    """100 cos of each pair of unit vectors (N, D): (N,)."""
    return (100 * (texts.double() * images.double()).sum(1)).numpy()


def _without_counts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in _NOT_WEIGHTS}


def _openai(state: dict[str, Tensor], path: Path) -> Any:
    from open_clip.model import build_model_from_openai_state_dict

    try:
        return build_model_from_openai_state_dict(_without_counts(state), cast_dtype=torch.float32)
    except (KeyError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        reason = " ".join(str(error).removeprefix("Error(s) in loading state_dict for CLIP:").split())
        raise UserError(f"weights {path} are not of a CLIP of OpenAI's: {reason[:200]}") from error
