"""The networks that measure, from local weights; what has none is not measured."""

from dataclasses import dataclass
from pathlib import Path

import torch

from bilevel_fast.base.files import sha256
from bilevel_fast.metrics.clip_score import ClipScorer
from bilevel_fast.metrics.csd import StyleDescriptor
from bilevel_fast.metrics.fid import Inception
from bilevel_fast.metrics.images import USUAL, Batching
from bilevel_fast.metrics.nudenet import NudeNet


@dataclass(frozen=True)
class Scorers:
    """Scorers of a suite; None is a metric that stays unmeasured."""

    clip: ClipScorer | None = None
    csd: StyleDescriptor | None = None
    inception: Inception | None = None
    nudenet: NudeNet | None = None
    weights: tuple[tuple[str, str, str], ...] = ()
    """What was read: flag, file, SHA-256."""

    @classmethod
    def load(
        cls,
        *,
        clip_weights: Path | None = None,
        clip_model: str | None = None,
        csd_weights: Path | None = None,
        inception_weights: Path | None = None,
        nudenet: bool = False,
        device: str | torch.device = "cpu",
        batching: Batching = USUAL,
    ) -> "Scorers":
        """Read those whose weights are given.

        Raises:
            UserError: A package or a file is missing, damaged, or of another architecture.
        """
        given = {"clip-weights": clip_weights, "csd-weights": csd_weights, "inception-weights": inception_weights}
        return cls(
            clip=ClipScorer.load(clip_weights, clip_model, device=device, batching=batching) if clip_weights else None,
            csd=StyleDescriptor.load(csd_weights, device=device, batching=batching) if csd_weights else None,
            inception=Inception.load(inception_weights, device=device, batching=batching)
            if inception_weights
            else None,
            nudenet=NudeNet(batching.team) if nudenet else None,
            weights=tuple((flag, str(path), sha256(Path(path))) for flag, path in given.items() if path),
        )
