"""The judge of a drawn world: a small CNN that names what an image shows and its style, and gives features for FID.

    python -m bilevel_fast.worlds.NAME.probe --out FILE  trains a probe (two minutes of one core), prints its accuracy

Trained on drawn images with light blur and noise, so that it reads what a network paints as well.
Shapes: B images, D = 64 features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel_fast.base import flags
from bilevel_fast.base.errors import UserError, in_range
from bilevel_fast.base.files import write_atomic
from bilevel_fast.models.weights import read_weights
from bilevel_fast.ops.randomness import Stream, integers, normal, uniform
from bilevel_fast.worlds.scenes import Drawings, S, Scene

FEATURES = 64
_FRESH = 1 << 40  # first sample index of the images that accuracy is measured on; training never gets there


@dataclass(frozen=True)
class ProbeOutput:
    """What the probe sees in B images."""

    logits: tuple[Tensor, ...]
    """(B, number of labels) for each head, the style's last."""
    features: Tensor
    """(B, 64), for FID."""

    @property
    def labels(self) -> Tensor:
        """(B, heads) int64: the likeliest label of each head."""
        return torch.stack([head.argmax(1) for head in self.logits], dim=1)

    @property
    def style_logits(self) -> Tensor:
        """(B, number of styles)."""
        return self.logits[-1]


@dataclass(frozen=True)
class Accuracy:
    """Share of images that are read as asked for, by head."""

    shares: Mapping[str, float]

    def __str__(self) -> str:
        return "  ".join(f"{head} {share:.4f}" for head, share in self.shares.items())


def labels(scenes: Sequence[Scene]) -> Tensor:
    """What scenes show, (B, heads) int64."""
    return torch.tensor([scene.labels for scene in scenes], dtype=torch.int64)


class Probe(nn.Module):
    """Four convolutions, one hidden layer, a head for each kind of label. 0.3 M parameters.

    Args:
        heads: How many labels there are of each kind.
    """

    def __init__(self, heads: Mapping[str, int]) -> None:
        super().__init__()
        self.names, self.sizes = tuple(heads), tuple(heads.values())
        widths = (3, 32, 64, 96, 128)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1) for i, (a, b) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.hidden = nn.Linear(128 * 4 * 4, FEATURES)
        self.heads = nn.Linear(FEATURES, sum(self.sizes))

    def forward(self, images: Tensor) -> ProbeOutput:
        """Judge images (B, 3, 32, 32) in [-1, 1]."""
        h = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.relu(norm(conv(h)))
        features = F.relu(self.hidden(h.flatten(1)))
        return ProbeOutput(self.heads(features).split(self.sizes, dim=1), features)

    @torch.no_grad()
    def accuracy(self, images: Tensor, scenes: Sequence[Scene]) -> Accuracy:
        """How often images (B, 3, 32, 32) show the B scenes they should show."""
        right = (self(images).labels.cpu() == labels(scenes)).float().mean(0)
        return Accuracy(dict(zip(self.names, right.tolist(), strict=True)))

    def save(self, path: Path) -> None:
        """Write the weights in fp16."""
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        write_atomic(path, save(weights, metadata={"format": "pt"}))

    @classmethod
    def load(cls, world: Drawings[Any], path: Path | None = None) -> "Probe":
        """The shipped probe of a world, or another one of it: fp32, in eval mode, without gradients."""
        probe, path = cls(world.heads), path or world.probe_file
        probe.load_state_dict(read_weights(path.parent, path.stem))
        return probe.eval().requires_grad_(False)


def fresh_drawings(world: Drawings[S], per_scene: int, seed: int = 0) -> tuple[Tensor, list[S]]:
    """Drawings of every scene, placed as in no training: images (scenes * per_scene, 3, 32, 32) and their scenes."""
    scenes = list(world.scenes) * per_scene
    return world.render(scenes, seed, range(_FRESH, _FRESH + len(scenes))), scenes


def train(world: Drawings[Any], steps: int = 2000, batch: int = 64, lr: float = 1e-3, seed: int = 0) -> Probe:
    """Train a probe on freshly drawn images; the same seed gives the same probe on the same machine."""
    torch.manual_seed(seed)
    probe = Probe(world.heads)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        indices = range(step * batch, (step + 1) * batch)
        scenes = [world.scenes[i] for i in integers(seed, Stream.CAPTION, indices, len(world.scenes)).tolist()]
        seen = probe(_worsen(world.render(scenes, seed, indices), seed, indices))
        wanted = labels(scenes).unbind(1)
        heads = [F.cross_entropy(logits, label) for logits, label in zip(seen.logits, wanted, strict=True)]
        loss = torch.stack(heads).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"probe step {step}: loss {loss.item():.4f}", flush=True)
    return probe.eval().requires_grad_(False)


def _worsen(images: Tensor, seed: int, indices: range) -> Tensor:
    """Blur half of the images by up to a 3x3 mean, and add noise of a standard deviation up to 0.2 to each."""
    amount = uniform(seed, Stream.VIEW, indices, (2, 1, 1, 1))
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images + (amount[:, 0] * 2 - 1).clamp(min=0) * (blurred - images)
    return images + 0.2 * amount[:, 1] * normal(seed, Stream.NOISE, indices, tuple(images.shape[1:]))


@dataclass(frozen=True)
class ProbeConfig:
    """Train a probe, save it, and print its accuracy on drawings that are moved and turned as no training saw them."""

    out: Path | None = None
    """The file to write, NAME.safetensors, or with --steps 0 to measure; by default the shipped one is measured."""
    overwrite: bool = False
    """Replace a file that is there."""
    steps: int = 2000
    """Optimizer steps. 0 measures."""
    seed: int = 0
    """Of the weights and of everything that is drawn."""


def command(world: Drawings[Any]) -> None:
    """`python -m bilevel_fast.worlds.NAME.probe`."""
    config = flags.parse(ProbeConfig, f"bilevel_fast.worlds.{world.name}.probe", ProbeConfig.__doc__)
    in_range("--steps", config.steps, ">= 0", config.steps >= 0)
    out = config.out
    if out is not None:
        in_range("--out", out, "a name that ends in .safetensors", out.suffix == ".safetensors")
    if config.steps:
        if out is None:
            raise UserError("--out is missing: the file to write; --steps 0 measures the shipped probe")
        if out.exists() and not config.overwrite:
            raise UserError(f"--out {out} exists already; choose another file, or give --overwrite")
        train(world, config.steps, seed=config.seed).save(out)
    accuracy = Probe.load(world, out).accuracy(*fresh_drawings(world, per_scene=10))
    print(f"probe on fresh drawings: {accuracy}")
