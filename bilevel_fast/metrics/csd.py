"""CSD: how alike the styles of two images are, 100 cos of their style descriptors.

    s(x) = h(x) W / |h(x) W|,   h: CLIP's ViT-L/14 image tower without its projection, W: the learnt style projection

The style table has the mean over pairs of same prompt and seed, of the erased and the distilled model: 100 for the
distilled model itself, lower is better. Its authors give no formula; this one fits their table.

Weights: the checkpoint that CSD's authors publish, {"model_state_dict": {"module.backbone. ...",
"module.last_layer_style", "module.last_layer_content"}, "opt_bb", "opt_proj", "iter", "args", ...}, or the state dict
alone. The architecture is read off the shapes: 64 features to a head, as in every ViT of CLIP.

Shape legend: N images, D = 768 features of ViT-L.

Source: arXiv:2404.01292, section 4.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from bilevel_fast.base.errors import UserError, require
from bilevel_fast.metrics.checkpoints import fit, read_checkpoint, tensors_of
from bilevel_fast.metrics.images import USUAL, Batching, open_rgb

_HEAD = 64


class StyleDescriptor:
    """Images to style descriptors. `load` makes one."""

    def __init__(self, backbone: nn.Module, projection: Tensor, side: int, batching: Batching):
        self.backbone, self.projection, self.batching = backbone.eval().requires_grad_(False), projection, batching
        open_clip = require("open_clip", "metrics")
        self.transform = open_clip.image_transform(side, is_train=False)

    @classmethod
    def load(cls, path: Path, *, device: str | torch.device = "cpu", batching: Batching = USUAL) -> "StyleDescriptor":
        """Read a checkpoint.

        Raises:
            UserError: open_clip is not installed, the file is missing or damaged, or holds something else.
        """
        path = Path(path)
        require("open_clip", "metrics")
        state = tensors_of(read_checkpoint(path), "model_state_dict")
        head = {name: state.pop(name, None) for name in ("last_layer_style", "last_layer_content")}
        projection = head["last_layer_style"]
        wanted = ("backbone.conv1.weight", "backbone.positional_embedding")
        if projection is None or any(name not in state for name in wanted):
            raise UserError(f"weights {path} are no CSD checkpoint: they lack 'last_layer_style' or 'backbone'")
        backbone, side = _vision_tower({name.removeprefix("backbone."): t for name, t in state.items()}, path)
        width = backbone.conv1.weight.shape[0]  # type: ignore[union-attr]
        if projection.ndim != 2 or projection.shape[0] != width:
            raise UserError(
                f"weights {path}: 'last_layer_style' is {tuple(projection.shape)}, its tower has width {width}"
            )
        return cls(backbone.float().to(device), projection.float().to(device), side, batching)

    @torch.inference_mode()
    def images(self, files: Sequence[Path]) -> Tensor:
        """(N, D) fp32 unit vectors on the CPU.

        Raises:
            UserError: A file is missing or no whole picture.
        """
        parts = self.batching.measured(
            files,
            lambda file: self.transform(open_rgb(file)),
            lambda pixels: self.backbone(torch.stack(pixels).to(self.projection.device)) @ self.projection,
            "CSD",
        )
        return normalize(torch.cat(list(parts)), dim=1)


def csd_scores(images: Tensor, references: Tensor) -> NDArray[np.float64]:
    """100 cos of each pair of descriptors (N, D): (N,)."""
    return (100 * (images.double() * references.double()).sum(1)).numpy()


def _vision_tower(state: dict[str, Tensor], path: Path) -> tuple[Any, int]:
    """CLIP's image tower without its projection, and the side of its images in pixels."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    width, patch = state["conv1.weight"].shape[0], state["conv1.weight"].shape[-1]
    layers = sum(name.endswith(".attn.in_proj_weight") for name in state)
    grid = math.isqrt(max(0, len(state["positional_embedding"]) - 1))
    if width % _HEAD or not layers or not grid:
        raise UserError(f"weights {path}: width {width}, {layers} layers and a grid of {grid} make no ViT of CLIP's")
    tower = VisionTransformer(
        grid * patch, patch, width, layers, width // _HEAD, 4.0, output_dim=width, act_layer=QuickGELU
    )  # fmt: skip
    tower.proj = None
    fit(tower, state, path, f"CLIP's ViT of width {width} and {layers} layers")
    return tower, grid * patch
