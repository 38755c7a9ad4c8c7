"""The emoji world: drawings of five studios, a small model of them, and the probe that judges both (MODEL_CARD.md)."""

from pathlib import Path

TEACHER = Path(__file__).parent / "weights" / "teacher"
"""The model folder of the shipped teacher."""
