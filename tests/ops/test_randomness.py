import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bilevel_fast.base.errors import UserError
from bilevel_fast.ops.native import _C
from bilevel_fast.ops.randomness import Stream, integers, normal, permutation, uniform

SEEDS = st.integers(0, 2**64 - 1)
INDICES = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5)
LEVEL = 1e-3  # seeds are fixed, so a statistical test passes always or never

# counter, key -> output: kat_vectors of Random123, philox4x32 with 10 rounds
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def raw(seed: int, stream: int, indices: list[int], elements: int) -> np.ndarray:
    index = np.array(indices, dtype=np.int64)
    out = np.zeros((len(indices), elements), dtype=np.uint32)
    _C.philox_words(out.ctypes.data, elements, seed, stream, index.ctypes.data, len(indices))
    return out


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, expected):
    assert _C.philox_block(words(counter), words(key)) == words(expected)


@given(SEEDS, st.sampled_from(Stream), INDICES, st.integers(1, 11))
def test_words_follow_the_documented_counter(seed, stream, indices, elements):
    got = raw(seed, stream, indices, elements)
    for row, index in zip(got, indices, strict=True):
        blocks = [
            _C.philox_block((block, stream, index % 2**32, index >> 32), (seed % 2**32, seed >> 32))
            for block in range(-(-elements // 4))
        ]
        assert row.tolist() == np.concatenate(blocks)[:elements].tolist()


@given(SEEDS, INDICES)
def test_numbers_follow_the_documented_mapping(seed, indices):
    w = raw(seed, Stream.NOISE, indices, 6)
    u = (w >> 8).astype(np.float32) * np.float32(2.0**-24)
    assert np.array_equal(uniform(seed, Stream.NOISE, indices, (2, 3)).numpy().reshape(-1, 6), u)

    first = w[:, 0::2].astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    radius, angle = np.sqrt(-2 * np.log(first.astype(np.float64))), 2 * np.pi * u[:, 1::2].astype(np.float64)
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1, 6)
    assert np.allclose(normal(seed, Stream.NOISE, indices, (6,)).numpy(), z, rtol=3e-7, atol=1e-30)

    x = w[:, 0].astype(object) + 2**32 * w[:, 1].astype(object)
    high = 10**12 + 39
    assert integers(seed, Stream.NOISE, indices, high).tolist() == [int(v) * high >> 64 for v in x]


@settings(max_examples=25)
@given(SEEDS, INDICES, st.data())
def test_a_sample_is_the_same_in_any_batch(seed, indices, data):
    order = data.draw(st.permutations(range(len(indices))))
    batch = normal(seed, Stream.NOISE, indices, (3, 5))
    shuffled = normal(seed, Stream.NOISE, [indices[i] for i in order], (3, 5))
    assert torch.equal(shuffled, batch[list(order)])
    alone = torch.cat([normal(seed, Stream.NOISE, [i], (3, 5)) for i in indices])
    assert torch.equal(alone, batch)
    more = uniform(seed, Stream.VIEW, np.array(indices), (40,))
    assert torch.equal(more[:, :7], uniform(seed, Stream.VIEW, indices, (7,)))  # a prefix stays a prefix


def test_seed_stream_and_index_all_matter():
    draws = [
        normal(seed, stream, [index], (64,))
        for seed in (0, 1, 2**32)
        for stream in (Stream.NOISE, Stream.WORLD)
        for index in (0, 1, 2**32)
    ]
    correlation = np.corrcoef(torch.cat(draws).numpy())
    assert np.abs(correlation - np.eye(len(draws))).max() < 5 / np.sqrt(64)


@pytest.mark.parametrize("axis", ["samples", "elements"])
def test_normals_are_standard_and_independent(axis):
    n = 200_000
    indices, shape = (range(n), (2,)) if axis == "samples" else ([3], (n, 2))
    z = normal(7, Stream.NOISE, indices, shape).reshape(n, 2).numpy().astype(np.float64)
    for column in z.T:
        assert stats.kstest(column, "norm").pvalue > LEVEL
        assert abs(column.mean()) < 4 / np.sqrt(n)
        assert abs(column.var() - 1) < 4 * np.sqrt(2 / n)
        assert abs((column**4).mean() - 3) < 4 * np.sqrt(96 / n)
    assert abs(np.corrcoef(z.T)[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.corrcoef(z[1:, 0], z[:-1, 0])[0, 1]) < 4 / np.sqrt(n)


def test_uniforms_fill_the_unit_interval():
    u = uniform(11, Stream.VIEW, range(50_000), (4,)).numpy()
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.ravel().astype(np.float64), "uniform").pvalue > LEVEL


@pytest.mark.parametrize("high", [1, 2, 7, 1000])
def test_integers_are_uniform(high):
    n = 100_000
    drawn = integers(5, Stream.TIMESTEP, range(n), high)
    counts = np.bincount(drawn.numpy(), minlength=high)
    assert len(counts) == high
    assert counts.min() > 0
    assert high == 1 or stats.chisquare(counts).pvalue > LEVEL


def test_integers_reach_the_ends_of_a_huge_range():
    drawn = integers(0, Stream.TIMESTEP, range(2000), 2**63 - 1).double() / 2**63
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > LEVEL


@settings(max_examples=25)
@given(SEEDS, st.integers(0, 2**62), st.integers(0, 300))
def test_permutation_is_one(seed, epoch, n):
    order = permutation(seed, Stream.SHUFFLE, epoch, n)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_permutations_are_uniform_and_change_with_the_epoch():
    orders = [tuple(permutation(0, Stream.SHUFFLE, epoch, 4)) for epoch in range(6000)]
    assert stats.chisquare(np.unique(orders, axis=0, return_counts=True)[1]).pvalue > LEVEL
    assert len(set(orders)) == 24


def test_triton_makes_the_same_words(device):
    @triton.jit
    def kernel(out_ptr, seed, stream, index_lo, index_hi, BLOCK: tl.constexpr):
        c0 = tl.arange(0, BLOCK)
        w0, w1, w2, w3 = tl.philox(seed, c0, c0 * 0 + stream, c0 * 0 + index_lo, c0 * 0 + index_hi)
        tl.store(out_ptr + 4 * c0, w0)
        tl.store(out_ptr + 4 * c0 + 1, w1)
        tl.store(out_ptr + 4 * c0 + 2, w2)
        tl.store(out_ptr + 4 * c0 + 3, w3)

    seed, index = 0x123456789ABCDEF, (5 << 32) + 17
    out = torch.zeros(64, dtype=torch.int32, device=device)
    kernel[(1,)](out, seed, int(Stream.WORLD), index % 2**32, index >> 32, BLOCK=16)
    assert np.array_equal(out.cpu().numpy().view(np.uint32), raw(seed, Stream.WORLD, [index], 64)[0])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_a_user_error(seed):
    with pytest.raises(UserError, match=rf"seed is {seed}; it must be in \[0, 2\*\*64\)"):
        normal(seed, Stream.NOISE, [0], (1,))


def test_empty_batches_and_shapes():
    assert normal(0, Stream.NOISE, [], (4, 8, 8)).shape == (0, 4, 8, 8)
    assert integers(0, Stream.TIMESTEP, [], 10).shape == (0,)
    assert uniform(0, Stream.CAPTION, [1, 2]).shape == (2,)
