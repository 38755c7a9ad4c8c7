"""Attacks that ask for an erased concept without naming it, in the space of the text encoder's states.

    concept vector  f(p) + s (mean of f(with) - f(without))     over prompts with and without the concept: what
                    Ring-A-Bell (arXiv:2310.10012, section 3) searches words for. It never looks at the model.
    inversion       f(p) + d, d learnt against the model: its diffusion loss on images of the concept, under prompts
                    that do not name it (after arXiv:2308.01508, which learns a word; here any state may move)

f(p) (L, D) are the states of a prompt without the concept; d and the vector are one (L, D) tensor for all prompts. What
a model reads beside the states (`models.conditioning`) stays as it is.
`unlearn_diff`, `ring_a_bell` and `mma` search words instead. The paper's Table 2 takes published lists of prompts that
were found so, which `full` reads from files.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel_fast.attacking.looks import frozen
from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batches import Batches
from bilevel_fast.data.sources import LatentSource
from bilevel_fast.models.diffusion import Schedule, noise
from bilevel_fast.models.text_encoder import TextEncoder, token_states
from bilevel_fast.models.unet import UNet

LEVEL = 2  # of the random numbers: neither the lower nor the upper level's


class Shifted:
    """A text encoder whose states of every prompt but the null one are moved by the same tensor (L, D).

    `spared` are texts that an attacker cannot reach: what the sampler itself asks for.
    """

    def __init__(self, encoder: TextEncoder, shift: Tensor, spared: Sequence[str] = ()):
        self.encoder, self.shift, self.spared = encoder, shift, spared

    @property
    def width(self) -> int:
        return self.encoder.width

    @property
    def length(self) -> int:
        return self.encoder.length

    @property
    def pooled(self) -> int:
        return self.encoder.pooled

    def encode(self, prompts: Sequence[str]) -> Tensor:
        text = self.encoder.encode(prompts)
        reached = [bool(prompt.strip()) and prompt not in self.spared for prompt in prompts]
        named = torch.tensor(reached, device=text.device)
        return text + named[:, None, None] * _shift_of(text, self.shift)

    def mask(self, prompts: Sequence[str]) -> Tensor:
        return self.encoder.mask(prompts)


def concept_vector(encoder: TextEncoder, prompts: Sequence[str], anchors: Sequence[str], strength: float) -> Tensor:
    """What the concept adds to the states of a prompt, on average, times `strength`: (L, D) fp32.

    Args:
        prompts: With the concept.
        anchors: The same prompts without it.

    Raises:
        UserError: The lists are empty or of different lengths.
    """
    if not prompts or len(prompts) != len(anchors):
        raise UserError(f"{len(anchors)} prompts without the concept came for {len(prompts)} with it")
    return strength * (token_states(encoder, prompts) - token_states(encoder, anchors)).mean(0)


def inverting(
    unet: UNet,
    schedule: Schedule,
    encoder: TextEncoder,
    bank: LatentSource,
    start: Tensor,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
) -> Iterator[Tensor]:
    """Learn a shift of the text states that makes a model draw the images of a concept bank under its anchors.

    Args:
        unet: The model; it is not changed, and frozen until the last step.
        bank: Images of the concept, with anchors.
        start: (L, D): where the search begins.
        steps, batch, lr: Of Adam.
        seed: Of batches and noise.

    Yields:
        The shift after each step, (L, D) fp32, on the UNet's device.
    """
    device = unet.conv_in.weight.device
    batches = Batches(bank, encoder, batch, seed, level=LEVEL, anchor="phrase")
    schedule = schedule.to(device)
    shift = start.detach().clone().to(device).requires_grad_(True)
    adam = torch.optim.Adam([shift], lr=lr)
    with frozen(unet):
        for step in range(steps):
            drawn = batches(step).map(lambda x: x.to(device)).drawn(seed, schedule.num_train_timesteps)
            assert drawn.eps is not None
            assert drawn.t is not None
            assert drawn.anchor is not None
            noised = noise(schedule, drawn.latents, drawn.eps, drawn.t, None)
            text = drawn.anchor + _shift_of(drawn.anchor, shift)
            adam.zero_grad()
            F.mse_loss(unet(noised.x, noised.t, text).out.float(), noised.target).backward()
            adam.step()
            yield shift.detach().clone()


def _shift_of(text: Tensor, shift: Tensor) -> Tensor:
    """A shift (L, D) of states as one of a whole text tensor (B, L + R, D): (L + R, D)."""
    return F.pad(shift.to(text), (0, 0, 0, text.shape[1] - len(shift)))
