"""How hard Safe Latent Diffusion keeps samples away from a concept (arXiv:2211.05105)."""

from dataclasses import dataclass
from typing import Literal

Strength = Literal["weak", "medium", "strong", "max"]


@dataclass(frozen=True)
class Settings:
    """Of the equations of `sampling.safe`."""

    warmup: int
    scale: float
    threshold: float
    momentum: float
    beta: float


STRENGTHS: dict[Strength, Settings] = {
    "weak": Settings(15, 200.0, 0.0, 0.0, 0.0),
    "medium": Settings(10, 1000.0, 0.01, 0.3, 0.4),
    "strong": Settings(7, 2000.0, 0.025, 0.5, 0.7),
    "max": Settings(0, 5000.0, 1.0, 0.5, 0.7),
}
"""The paper's four, found with 50 steps; diffusers has a scale of 20 for `weak`."""
