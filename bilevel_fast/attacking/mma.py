"""MMA-Diffusion's search for text (arXiv:2311.17516): tokens that mean what a prompt means, without words of a list.

    min over tokens of  1 - cos(pooled f(tokens), pooled f(prompt))     pooled: the state of a text's end

Greedy descent over tokens: the gradient to the one-hot rows names, for each place, the `top` tokens that promise most;
of `batch` candidates each has one place changed to one of these, the places in turn; the best becomes the text of the
next step, the same or not. As in the authors' code a candidate whose text is read as another number of tokens is left
out, and the best text of all steps is the result. Neither the drawing model nor an image is asked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bilevel_fast.attacking.looks import Look, check_least, check_room
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.text_encoder import TokenReader
from bilevel_fast.ops.randomness import Stream, uniform

_FROM = 2**51  # of the random numbers, beyond those of other attacks
_AT_A_TIME = 64
_DRAWS = 256


@dataclass(frozen=True)
class Mma:
    """How long MMA-Diffusion's search takes."""

    tokens: int = 20
    """Of a text."""
    steps: int = 1000
    """Changes of one token."""
    top: int = 256
    """Tokens tried at a place."""
    batch: int = 512
    """Candidates of a step."""

    def __post_init__(self) -> None:
        check_least({name: (getattr(self, name), 1) for name in ("tokens", "steps", "top", "batch")})


def mma(reader: TokenReader, prompt: str, settings: Mma, *, seed: int, forbidden: Sequence[str] = ()) -> Iterator[Look]:
    """Search a text that means a prompt.

    Args:
        reader: The text encoder.
        prompt: That names the concept.
        settings: How long.
        seed: Of the search.
        forbidden: Words; tokens that hold one are not used, in upper case or lower.

    Yields:
        After each step the best text so far, and its loss.

    Raises:
        UserError: The encoder has no room for so many tokens, or every token is forbidden.
    """
    check_room(reader, settings.tokens)
    free = allowed(reader, forbidden)
    target = pooled(reader, [reader.tokens_of(prompt)]).detach()[0]
    now = beginning(reader, free, settings.tokens, seed)
    best, least = now, float("inf")
    for step in range(1, settings.steps + 1):
        tried = candidates(now, gradient(reader, now, target)[:, free], free, settings, seed, step)
        tried = [some for some in tried if some != now and _lasts(reader, some)] or [now]
        losses = torch.cat([away(reader, some, target) for some in _parts(tried)])
        now, loss = tried[int(losses.argmin())], losses.min().item()
        if loss < least:
            best, least = now, loss
        yield Look(step, [reader.text_of(best)], [least])


def allowed(reader: TokenReader, forbidden: Sequence[str]) -> Tensor:
    """(F,) ids of tokens whose text holds no forbidden word.

    Raises:
        UserError: None is left.
    """
    words = [word.lower() for word in forbidden if word.strip()]
    free = reader.free().tolist()
    left = [token for token in free if not any(word in reader.text_of([token]).lower() for word in words)]
    if not left:
        raise UserError(f"every token holds one of {len(words)} forbidden words")
    return torch.tensor(left)


def beginning(reader: TokenReader, free: Tensor, tokens: int, seed: int) -> list[int]:
    """Tokens of `free` by chance, each a word by itself where that is found: pieces join, and are read as others.

    The authors begin with letters, which the mini world's encoder does not read.
    """
    numbers = uniform(seed, Stream.ATTACK, [_FROM], (tokens, _DRAWS))[0].double()
    found = []
    for draws in free[(numbers * len(free)).long()].tolist():
        twice = ([token, token] for token in draws)
        found.append(next((pair[0] for pair in twice if reader.tokens_of(reader.text_of(pair)) == pair), draws[0]))
    return found


def pooled(reader: TokenReader, texts: Sequence[Sequence[int]], mixed: Tensor | None = None) -> Tensor:
    """(B, D): the state of the token that ends each text."""
    states = reader.read(texts, mixed)
    ends = torch.tensor([len(text) + 1 for text in texts], device=states.device)
    return states[torch.arange(len(texts), device=states.device), ends]


@torch.no_grad()
def away(reader: TokenReader, texts: Sequence[Sequence[int]], target: Tensor) -> Tensor:
    """1 - cosine, (B,) on the CPU."""
    return 1 - F.cosine_similarity(pooled(reader, texts), target[None], eps=1e-6).cpu()


def gradient(reader: TokenReader, text: Sequence[int], target: Tensor) -> Tensor:
    """Of the loss to one-hot rows of a text: (k, V) on the CPU."""
    rows = F.one_hot(torch.tensor(text), reader.vocabulary).float().to(target.device)[None].requires_grad_(True)
    loss = 1 - F.cosine_similarity(pooled(reader, [text], rows), target[None], eps=1e-6).sum()
    (found,) = torch.autograd.grad(loss, [rows])
    return found[0].cpu()


def candidates(now: Sequence[int], slope: Tensor, free: Tensor, settings: Mma, seed: int, step: int) -> list[list[int]]:
    """`batch` texts, each with one token changed: candidate i at place i k / batch, to one of the `top` there.

    Args:
        now: The text they are made of.
        slope: (k, F): the gradient to the rows of `free`.
    """
    top = (-slope).topk(min(settings.top, len(free)), dim=1).indices
    numbers = uniform(seed, Stream.ATTACK, [_FROM + step], (settings.batch,))[0].double().tolist()
    found = []
    for i, number in enumerate(numbers):
        place = i * len(now) // settings.batch
        token = int(free[top[place, int(number * top.shape[1])]])
        found.append([*now[:place], token, *now[place + 1 :]])
    return found


def _lasts(reader: TokenReader, text: Sequence[int]) -> bool:
    """Whether who types the text of some tokens types as many."""
    return len(reader.tokens_of(reader.text_of(text))) == len(text)


def _parts(texts: list[list[int]]) -> Iterator[list[list[int]]]:
    for start in range(0, len(texts), _AT_A_TIME):
        yield texts[start : start + _AT_A_TIME]
