"""Safe Latent Diffusion (arXiv:2211.05105): guidance away from a concept's text while sampling; no weight changes.

With what the network says about x_t without a prompt (e_0), for the prompt (e_p) and for the concept's text (e_s), all
as noise, guidance scale g and momentum n, which begins at 0 (equations 3 to 8 of the paper):

    mu    = min(1, s |e_p - e_s|)  where  e_p - e_s < threshold,  else 0       by element
    gamma = mu (e_s - e_0) + momentum n
    n    <- beta n + (1 - beta) gamma                                           from the first call on
    e     = e_0 + g (e_p - e_0 - gamma)                                         gamma only after `warmup` calls

The paper prints max(1, s |e_p - e_s|); its released code and diffusers' StableDiffusionPipelineSafe compute min, which
is what the published settings were found with: so does this. With max, s = 1000 throws latents far off.

Thresholds are of differences of noise. Where a network says v, such a difference is alpha_t times that of its outputs,
so outputs are compared as noise, and gamma goes back into them divided by alpha_t.

A call of the network has a third row for each image. Any sampler of `samplers` walks with it; the two calls that PNDM
begins with at one timestep count as two, as in diffusers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.sampling.samplers import Output, Predict
from bilevel_fast.sampling.strength import STRENGTHS, Settings, Strength


@dataclass(frozen=True)
class Safe:
    """What to keep away from, and how hard.

    Raises:
        UserError: There is no such strength, or nothing to keep away from.
    """

    concept: str
    """Its text: `in the style of pointillism`, `nudity, sexual acts`."""
    strength: Strength = "medium"

    def __post_init__(self) -> None:
        if not self.concept.strip():
            raise UserError("--safe is empty; wanted the text of what is to be kept away from")
        if self.strength not in (known := get_args(Strength)):
            raise UserError(f"--safe-strength {self.strength!r} does not exist{nearest(self.strength, known)}")

    def check(self, steps: int, flag: str = "--safe-strength") -> None:
        """Refuse a walk that is over before the guidance begins; `flag` says the strength.

        Raises:
            UserError: Names the strengths that begin earlier.
        """
        if (first := STRENGTHS[self.strength].warmup) >= steps:
            able = ", ".join(name for name, settings in STRENGTHS.items() if settings.warmup < steps)
            raise UserError(
                f"{flag} {self.strength} begins after {first} steps, and there are {steps}: nothing would be kept "
                f"away; wanted more steps, or one of {able}"
            )

    def predictor(
        self,
        model: Callable[[Tensor, Tensor, Tensor], Output],
        text: Tensor,
        null: Tensor,
        encoder: TextEncoder,
        guidance: float,
        schedule: Schedule,
    ) -> Predict:
        """As `samplers.guided`, kept away from the concept; for one walk, as it counts calls and has momentum."""
        concept = encoder.encode([self.concept]).to(text.device)
        return kept_away(model, text, null, concept, guidance, STRENGTHS[self.strength], schedule)


def safe_of(concept: str | None, strength: Strength | None) -> Safe | None:
    """What two flags say; None where nothing is to be kept away from.

    Raises:
        UserError: A strength came without a concept, or either is none.
    """
    if concept is None:
        if strength is not None:
            raise UserError(f"--safe-strength {strength} is for --safe, and no concept was named")
        return None
    return Safe(concept) if strength is None else Safe(concept, strength)


def kept_away(
    model: Callable[[Tensor, Tensor, Tensor], Output],
    text: Tensor,
    null: Tensor,
    concept: Tensor,
    guidance: float,
    settings: Settings,
    schedule: Schedule,
) -> Predict:
    """A predictor of one walk: one call of three times the batch, [unconditional, conditional, concept].

    Args:
        model: model(x (B, C, H, W), t (B,), text (B, L, D)) -> an object with `.out`, such as a UNet.
        text: (B, L, D) encoded prompts.
        null: (1, L, D), the encoded empty prompt.
        concept: (1, L, D), the encoded text of what is to be kept away from.
        guidance: Of the prompt, and of the concept in the other direction; 1 still wants all three rows.
        settings: One of `STRENGTHS`.
        schedule: Says what an output is.
    """
    three, schedule = torch.cat([null.expand_as(text), text, concept.expand_as(text)]), schedule.to(text.device)
    momentum, calls = torch.zeros((), device=text.device), 0

    def predict(x: Tensor, t: Tensor) -> Tensor:
        nonlocal momentum, calls
        out_0, out_p, out_s = model(x.repeat(3, 1, 1, 1), t.repeat(3), three).out.float().chunk(3)
        # at the very end of a schedule without signal alpha is 0, and so are all differences of noise
        alpha = schedule.alpha_sigma(t)[0].clamp(min=torch.finfo(torch.float32).eps)
        alpha = alpha if schedule.prediction_type == "v_prediction" else torch.ones_like(alpha)
        apart = alpha * (out_p - out_s)
        mu = (settings.scale * apart.abs()).clamp(max=1) * (apart < settings.threshold)
        gamma = mu * alpha * (out_s - out_0) + settings.momentum * momentum
        momentum = settings.beta * momentum + (1 - settings.beta) * gamma
        calls += 1
        away = gamma / alpha if calls > settings.warmup else 0.0
        return out_0 + guidance * (out_p - out_0 - away)

    return predict
