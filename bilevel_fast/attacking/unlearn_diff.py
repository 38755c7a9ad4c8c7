"""UnlearnDiffAtk (arXiv:2310.11868): tokens before a prompt by which the attacked model paints an image of it.

    min over p in simplex^k of  |eps - eps_S(x_t, t, [tokens ~ p, prompt])|^2        x_t: the image, noised to t

p (k, V) are probabilities over the vocabulary, all the same at first. A step draws k tokens of p and takes the gradient
of their one-hot rows, cut to [-1, 1], for that of p (straight through); Adam moves p, and a projection brings it back
onto the simplex. `iterations` steps at each of `timesteps` times, from the least noise to the most; after each time the
likeliest tokens are put before the prompt. Whoever paints that prompt with the image's own noise and sees the concept
has won, and stops. The attacked model is asked and no other one, no classifier.

Settings are those of the authors' configuration. As theirs, the gradient of the squared error is that of a mean over
the latent. What differs: tokens that begin, end or pad a text are never drawn; the projection is exact, where theirs
halves intervals; a model that predicts v is attacked through v.

    B images, k tokens, V vocabulary, F of them free
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel_fast.attacking.looks import Look, check_least, check_room, frozen
from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import LEVEL_STRIDE
from bilevel_fast.models.diffusion import Schedule, noise
from bilevel_fast.models.text_encoder import TokenReader
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, normal, uniform

_FROM = 3 * LEVEL_STRIDE  # of the random numbers: no level's, nor the inversion's
_IMAGE = 2**24  # numbers between two images': more steps than anybody takes


@dataclass(frozen=True)
class UnlearnDiff:
    """How long UnlearnDiffAtk searches."""

    tokens: int = 3
    """Before each prompt; the authors take 5 for nudity."""
    iterations: int = 40
    """Steps at each time."""
    timesteps: int = 50
    """Times, evenly from the schedule."""
    lr: float = 0.01
    """Learning rate of Adam."""
    weight_decay: float = 0.1
    """Of Adam, added to the gradient."""

    def __post_init__(self) -> None:
        some = {name: (getattr(self, name), 1) for name in ("tokens", "iterations", "timesteps")}
        check_least({**some, "lr": (self.lr, 0), "weight-decay": (self.weight_decay, 0)})


def times(count: int, of: int) -> range:
    """`count` times of a schedule's, half a stride from its beginning: 10, 30, ..., 990 are 50 of 1,000.

    Raises:
        UserError: There are fewer.
    """
    if count > of:
        raise UserError(f"--timesteps is {count}; the model's schedule has {of}")
    stride = of // count
    return range(stride // 2, of, stride)[:count]


def project(p: Tensor) -> Tensor:
    """The nearest points of the simplex: rows (..., F) that are not negative and sum to 1."""
    down = p.sort(dim=-1, descending=True).values
    above = (down.cumsum(-1) - 1) / torch.arange(1, p.shape[-1] + 1, device=p.device, dtype=p.dtype)
    last = (down > above).sum(-1, keepdim=True) - 1
    return (p - above.gather(-1, last)).clamp_min(0)


class Drawn(torch.autograd.Function):
    """One-hot rows of tokens drawn by probabilities (..., F); backward cuts their gradient to [-1, 1] and passes it on.

    `u` (...) in [0, 1) decides the draw.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, u: Tensor) -> Tensor:
        rising = p.double().cumsum(-1)
        token = (rising <= u[..., None] * rising[..., -1:]).sum(-1).clamp_max(p.shape[-1] - 1)
        return F.one_hot(token, p.shape[-1]).to(p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].clamp(-1, 1), None


def unlearn_diff(
    unet: UNet,
    schedule: Schedule,
    reader: TokenReader,
    latents: Tensor,
    prompts: Sequence[str],
    settings: UnlearnDiff,
    *,
    seed: int,
    rows: Sequence[int] | None = None,
) -> Iterator[Look]:
    """Search tokens for each image by itself, all at once.

    Args:
        unet: The attacked model; it is not changed, and frozen until the last step.
        schedule: Its own.
        reader: Its text encoder.
        latents: (B, C, H, W) scaled, clean: images that show the concept, best what the unharmed model painted.
        prompts: B prompts that they should be painted by.
        settings: How long.
        seed: Of noise and draws.
        rows: Numbers of the images, from which their noise comes: alone or among others they are attacked alike.
            Default: 0 to B - 1.

    Yields:
        After each time: B prompts with the likeliest tokens before them, and the mean loss at that time of each.

    Raises:
        UserError: The tokens have no room, or the schedule has too few times.
    """
    behind = [reader.tokens_of(prompt) for prompt in prompts]
    for prompt, some in zip(prompts, behind, strict=True):
        check_room(reader, settings.tokens, some, prompt)
    device, schedule = latents.device, schedule.to(latents.device)
    first = torch.as_tensor(range(len(prompts)) if rows is None else rows, dtype=torch.int64) * _IMAGE + _FROM
    free, count = reader.free().to(device), len(prompts)
    p = torch.full((count, settings.tokens, len(free)), 1 / len(free), device=device, requires_grad=True)
    adam = torch.optim.Adam([p], lr=settings.lr, weight_decay=settings.weight_decay)
    step = 0
    with frozen(unet):
        for time in times(settings.timesteps, schedule.num_train_timesteps):
            t, total = torch.full((count,), time, device=device), torch.zeros(count, device=device)
            for _ in range(settings.iterations):
                eps = normal(seed, Stream.NOISE, first + step, tuple(latents.shape[1:])).to(device)
                u = uniform(seed, Stream.ATTACK, first + step, (settings.tokens,)).to(device)
                drawn = Drawn.apply(p, u)
                texts = _before(free[drawn.detach().argmax(-1)], behind)
                mixed = torch.zeros(count, settings.tokens, reader.vocabulary, device=device)
                noised = noise(schedule, latents, eps, t, None)
                out = unet(noised.x, t, reader.read(texts, mixed.index_copy(2, free, drawn)).to(noised.x)).out
                losses = (out.float() - noised.target).square().flatten(1).mean(1)
                (p.grad,) = torch.autograd.grad(losses.sum(), [p])
                adam.step()
                p.data.copy_(project(p.data))
                total += losses.detach()
                step += 1
            texts = _before(free[p.detach().argmax(-1)], behind)
            yield Look(step, [reader.text_of(some) for some in texts], (total / settings.iterations).tolist())


def _before(tokens: Tensor, behind: Sequence[Sequence[int]]) -> list[list[int]]:
    """Tokens (B, k), each row before those of its prompt."""
    return [[*some, *rest] for some, rest in zip(tokens.tolist(), behind, strict=True)]
