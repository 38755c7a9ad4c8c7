"""Settings of the losses; a module of its own, as a command line reads settings without torch."""

from dataclasses import dataclass

from bilevel_fast.base.errors import UserError


@dataclass(frozen=True)
class LossWeights:
    """Weights of the fine-tuning loss. A term of weight 0 is not computed."""

    diffusion: float = 1.0
    """Against the true v, weighted by SNR."""
    output: float = 2.0
    """Against the teacher's output."""
    feature: float = 0.1
    """Against the teacher's block outputs."""

    def __post_init__(self) -> None:
        weights = (self.diffusion, self.output, self.feature)
        if not (all(w >= 0 for w in weights) and any(weights)):
            raise UserError(f"loss weights {weights} must not be negative, nor all zero")
