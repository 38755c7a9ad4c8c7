"""The judge of the mini world: a small CNN that names object, colour and style, and gives features for FID.

    python -m bilevel_fast.worlds.mini.probe --out FILE  trains a probe (two minutes of one core), prints its accuracy

Trained on drawn images with light blur and noise, so that it reads what a network paints as well.
Shapes: B images, D = 64 features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError, in_range
from bilevel_fast.base.files import write_atomic
from bilevel_fast.models.weights import read_weights
from bilevel_fast.ops.randomness import Stream, integers, normal, uniform
from bilevel_fast.worlds.mini.world import COLORS, OBJECTS, SCENES, STYLES, Scene, labels, render

WEIGHTS = Path(__file__).parent / "weights" / "probe" / "model.safetensors"
FEATURES = 64
_FRESH = 1 << 40  # first sample index of the images that accuracy is measured on; training never gets there


@dataclass(frozen=True)
class ProbeOutput:
    """What the probe sees in B images."""

    object_logits: Tensor  # (B, 6)
    color_logits: Tensor  # (B, 6)
    style_logits: Tensor  # (B, 6)
    features: Tensor  # (B, 64), for FID

    @property
    def logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of object, colour and style."""
        return self.object_logits, self.color_logits, self.style_logits


@dataclass(frozen=True)
class Accuracy:
    """Share of images whose object, colour and style are read as asked for."""

    object: float
    color: float
    style: float

    def __str__(self) -> str:
        return f"object {self.object:.4f}  color {self.color:.4f}  style {self.style:.4f}"


class Probe(nn.Module):
    """Four convolutions, one hidden layer, three heads. 0.3 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1) for i, (a, b) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.hidden = nn.Linear(128 * 4 * 4, FEATURES)
        self.heads = nn.Linear(FEATURES, len(OBJECTS) + len(COLORS) + len(STYLES))

    def forward(self, images: Tensor) -> ProbeOutput:
        """Judge images (B, 3, 32, 32) in [-1, 1]."""
        h = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.relu(norm(conv(h)))
        features = F.relu(self.hidden(h.flatten(1)))
        objects, colors, styles = self.heads(features).split((len(OBJECTS), len(COLORS), len(STYLES)), dim=1)
        return ProbeOutput(objects, colors, styles, features)

    @torch.no_grad()
    def accuracy(self, images: Tensor, scenes: Sequence[Scene]) -> Accuracy:
        """How often images (B, 3, 32, 32) show the B scenes they should show."""
        seen = self(images)
        pairs = zip(seen.logits, labels(scenes), strict=True)
        return Accuracy(*((logits.argmax(1).cpu() == label).float().mean().item() for logits, label in pairs))

    def save(self, path: Path) -> None:
        """Write the weights in fp16."""
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}
        write_atomic(path, save(weights, metadata={"format": "pt"}))

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> "Probe":
        """The shipped probe: fp32, in eval mode, without gradients."""
        probe = cls()
        probe.load_state_dict(read_weights(path.parent, path.stem))
        return probe.eval().requires_grad_(False)


def fresh_drawings(per_scene: int, seed: int = 0) -> tuple[Tensor, list[Scene]]:
    """Fresh drawings of every scene that no training saw: images (216 * per_scene, 3, 32, 32) and their scenes."""
    scenes = list(SCENES) * per_scene
    images = render(*labels(scenes), seed, range(_FRESH, _FRESH + len(scenes)))
    return images, scenes


def train(steps: int = 2000, batch: int = 64, lr: float = 1e-3, seed: int = 0) -> Probe:
    """Train a probe on freshly drawn images; the same seed gives the same probe on the same machine."""
    torch.manual_seed(seed)
    probe = Probe()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        indices = range(step * batch, (step + 1) * batch)
        wanted = labels([SCENES[i] for i in integers(seed, Stream.CAPTION, indices, len(SCENES)).tolist()])
        seen = probe(_worsen(render(*wanted, seed, indices), seed, indices))
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
    """Train a probe, save it, and print its accuracy on held-out drawings."""

    out: Path
    """The file to write, NAME.safetensors. Never the shipped one, unless you name it."""
    overwrite: bool = False
    """Replace a file that is there."""
    steps: int = 2000
    """Optimizer steps."""
    seed: int = 0
    """Of the weights and of everything that is drawn."""


def main() -> None:
    config = flags.parse(ProbeConfig, "bilevel_fast.worlds.mini.probe", ProbeConfig.__doc__)
    in_range("--steps", config.steps, ">= 1", config.steps >= 1)
    in_range("--out", config.out, "a name that ends in .safetensors", config.out.suffix == ".safetensors")
    if config.out.exists() and not config.overwrite:
        raise UserError(f"--out {config.out} exists already; choose another file, or give --overwrite")
    train(config.steps, seed=config.seed).save(config.out)
    print(f"probe on held-out drawings: {Probe.load(config.out).accuracy(*fresh_drawings(per_scene=10))}")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
