"""The mini world: a drawn world, a tiny text-to-image model of it, and the probe that judges both (MODEL_CARD.md)."""

from pathlib import Path

TEACHER = Path(__file__).parent / "weights" / "teacher"
"""The model folder of the shipped teacher."""
