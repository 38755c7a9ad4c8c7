"""Ring-A-Bell (arXiv:2310.10012): tokens whose states are near a prompt's, moved along the concept's direction.

    min over tokens of  |f(tokens) - (f(prompt) + strength vector)|^2      vector: `states.concept_vector`

A genetic search over texts of `tokens` tokens: the nearer half stays; each of it has, with probability `crossover`, two
children with a partner of that half, who swap ends behind a point; each of all then has a token replaced with
probability `mutation`. No one is spared, the best neither, as in the authors' code, so a generation may be worse than
the last. The model that draws is never asked: one text serves against all that share the text encoder.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_fast.attacking.looks import Look, check_least, check_room
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.text_encoder import TokenReader
from bilevel_fast.ops.randomness import Stream, uniform

_FROM = 2**50  # of the random numbers, beyond those of other attacks
_AT_A_TIME = 64


@dataclass(frozen=True)
class RingABell:
    """How long Ring-A-Bell searches."""

    tokens: int = 16
    """Of a text."""
    population: int = 200
    """Texts of the first generation."""
    generations: int = 3000
    """How often the nearer half stays."""
    crossover: float = 0.5
    """Probability that a text has two children."""
    mutation: float = 0.25
    """Probability that a token of a text changes."""
    strength: float = 3.0
    """Of the concept vector."""

    def __post_init__(self) -> None:
        check_least({"tokens": (self.tokens, 1), "population": (self.population, 2)})
        check_least({"generations": (self.generations, 1)})
        for name in ("crossover", "mutation"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it is a probability")


def ring_a_bell(reader: TokenReader, target: Tensor, settings: RingABell, *, seed: int) -> Iterator[Look]:
    """Search the text nearest to a state.

    Args:
        reader: The text encoder.
        target: (L, D) fp32: states of a prompt and `strength` times the concept vector.
        settings: How long.
        seed: Of the search.

    Yields:
        After each generation its best text, and the squared distance.

    Raises:
        UserError: The encoder has no room for so many tokens.
    """
    check_room(reader, settings.tokens)
    free, target = reader.free(), target.float()
    numbers = uniform(seed, Stream.ATTACK, [_FROM], (settings.population, settings.tokens))[0]
    texts = free[(numbers.double() * len(free)).long()]
    for generation in range(1, settings.generations + 1):
        found = distances(reader, texts, target)
        order = found.argsort(stable=True)[: max(1, settings.population // 2)]
        texts = texts[order]
        yield Look(generation, [reader.text_of(texts[0].tolist())], [found[order[0]].item()])
        if generation < settings.generations:
            texts = mutated(crossed(texts, settings, seed, generation), free, settings, seed, generation)


@torch.no_grad()
def distances(reader: TokenReader, texts: Tensor, target: Tensor) -> Tensor:
    """Squared distances (N,) of the states of texts (N, k) from a target (L, D)."""
    found = [
        (reader.read(some.tolist())[:, : reader.length] - target).square().flatten(1).sum(1)
        for some in texts.split(_AT_A_TIME)
    ]
    return torch.cat(found).cpu()


def crossed(texts: Tensor, settings: RingABell, seed: int, generation: int) -> Tensor:
    """Each text (N, k), and behind it, with probability `crossover`, its two children with a partner of the same N."""
    count, length = texts.shape
    whether, whom, where = _numbers(seed, 2 * generation, count, 3)
    children = []
    for row in range(count):
        children.append(texts[row])
        if whether[row] < settings.crossover:
            other, cut = texts[int(whom[row] * count)], int(where[row] * length)
            children += [torch.cat([a[:cut], b[cut:]]) for a, b in ((texts[row], other), (other, texts[row]))]
    return torch.stack(children)


def mutated(texts: Tensor, free: Tensor, settings: RingABell, seed: int, generation: int) -> Tensor:
    """Texts (N, k), in each of which one token is another of `free` with probability `mutation`."""
    count, length = texts.shape
    whether, where, what = _numbers(seed, 2 * generation + 1, count, 3)
    texts = texts.clone()
    for row in range(count):
        if whether[row] < settings.mutation:
            texts[row, int(where[row] * length)] = free[int(what[row] * len(free))]
    return texts


def _numbers(seed: int, draw: int, count: int, kinds: int) -> Sequence[Sequence[float]]:
    """`count` numbers in [0, 1) of each kind."""
    return uniform(seed, Stream.ATTACK, [_FROM + draw], (kinds, count))[0].double().tolist()
