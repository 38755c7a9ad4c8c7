"""The mini world: a drawn world, a tiny text-to-image model of it, and the probe that judges both (MODEL_CARD.md)."""
