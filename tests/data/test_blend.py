"""Several sources by weight: who gets which sample, and batches of them."""

import random

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batches import Batches
from bilevel_fast.data.blend import Blend, Shares, parts_of, weights_of
from bilevel_fast.data.sources import MemorySource, exact_moments
from bilevel_fast.ops.randomness import Stream, permutation


class Spelling:
    """A text encoder that spells: a state is the characters of its prompt."""

    width, length, pooled = 4, 3, 0

    def encode(self, prompts):
        return torch.tensor([[[float(ord(c)) for c in f"{p:4}"[:4]]] * 3 for p in prompts])

    def mask(self, prompts):
        raise NotImplementedError


def bank(name: str, count: int, size: int = 4) -> MemorySource:
    """Sample i of bank `a` has the caption `a3` and latents of 3."""
    latents = torch.arange(count).float()[:, None, None, None].expand(count, 2, size, size)
    return MemorySource(exact_moments(latents), [[f"{name}{i}"] for i in range(count)], [""] * count)


def mixed(*counts: int, weights=None) -> Blend:
    names = "abcdefg"[: len(counts)]
    return Blend(names, [bank(n, c) for n, c in zip(names, counts, strict=True)], weights or [1.0] * len(counts))


def test_no_part_is_ever_a_sample_away_from_its_share():
    draw = random.Random(0)
    for _ in range(60):
        shares = Shares(
            [draw.choice([1.0, 1.0, 2.0, 5.0, 0.1, draw.random() + 0.01]) for _ in range(draw.randint(2, 9))]
        )
        counts = [0] * len(shares.weights)
        for sample in range(400):
            part, number = shares(sample)
            assert number == counts[part], "samples of a part are numbered as they come"
            counts[part] += 1
            off = [abs(c - w * (sample + 1)) for c, w in zip(counts, shares.weights, strict=True)]
            assert max(off) < 1


def test_shares_depend_on_the_sample_alone():
    forward, backward = Shares([3, 1, 2]), Shares([3, 1, 2])
    assert [forward(g) for g in range(60)] == [backward(g) for g in reversed(range(60))][::-1]
    assert [Shares([1, 1, 1])(g)[0] for g in range(6)] == [0, 1, 2, 0, 1, 2]
    assert Shares([0.3])(10**12) == (0, 10**12), "a single part has no table"


def test_a_mixture_holds_its_sources_one_after_the_other():
    source = mixed(3, 2, 4)
    assert len(source) == 9
    assert [source.captions(i)[0] for i in range(9)] == ["a0", "a1", "a2", "b0", "b1", "c0", "c1", "c2", "c3"]
    assert source.moments([4, 0, 8], [0, 0, 0])[:, 0, 0, 0].tolist() == [1, 0, 3]
    assert source.anchor(7) == ""
    assert (parts_of(source), weights_of(source)) == (source.sources, (1.0, 1.0, 1.0))
    assert (len(parts_of(bank("a", 3))), weights_of(bank("a", 3))) == (1, (1.0,))


@pytest.mark.parametrize(("weights", "wanted"), [(None, (4, 4)), ((3.0, 1.0), (6, 2))])
def test_every_batch_takes_its_shares_whatever_the_sizes(weights, wanted):
    batches = Batches(mixed(40, 3, weights=weights), Spelling(), 8, seed=5, level=1, anchor="phrase")
    for step in range(12):
        captions = batches(step).captions
        assert tuple(sum(c[0] == name for c in captions) for name in "ab") == wanted


def test_every_sample_once_per_epoch_of_its_own_source():
    batches = Batches(mixed(8, 2), Spelling(), 4, seed=1, level=1, anchor="phrase")
    drawn = [caption for step in range(4) for caption in batches(step).captions]
    assert sorted(c for c in drawn if c[0] == "a") == sorted(f"a{i}" for i in range(8))
    small = [c for c in drawn if c[0] == "b"]
    assert all(set(small[i : i + 2]) == {"b0", "b1"} for i in range(0, 8, 2))


def test_a_run_that_starts_later_sees_the_same_batches():
    whole, resumed = (
        Batches(mixed(7, 3, 5, weights=(2.0, 1.0, 0.7)), Spelling(), 4, seed=3, level=1, anchor="phrase")
        for _ in range(2)
    )
    for step in range(20):
        batch = whole(step)
    again = resumed(19)
    assert again.captions == batch.captions
    assert torch.equal(again.latents, batch.latents)


def test_one_source_is_drawn_as_it_always_was():
    """The first part's epochs have the numbers of a source that is alone: permutations by level and epoch."""
    level, seed, count = 1, 9, 6
    batches = Batches(bank("a", count), Spelling(), 4, seed=seed, level=level, anchor="phrase")
    drawn = [caption for step in range(3) for caption in batches(step).captions]
    orders = [permutation(seed, Stream.SHUFFLE, 2**40 * level + epoch, count) for epoch in range(2)]
    assert drawn == [f"a{i}" for order in orders for i in order]
    first = Batches(mixed(count, 2), Spelling(), 4, seed=seed, level=level, anchor="phrase")
    assert [c for c in first(0).captions if c[0] == "a"] == [f"a{i}" for i in orders[0][:2]]


def test_sources_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"b has latent shape \(2, 8, 8\), a has \(2, 4, 4\)"):
        Blend("ab", [bank("a", 2), bank("b", 2, size=8)], [1.0, 1.0])
