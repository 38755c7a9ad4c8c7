"""Rows and sums: everything has one place, and a sum of leaves has the bits of the same tree whoever adds them up."""

import pytest
import torch

from bilevel_fast.scale.rows import BUCKET, ROW, Counter, buckets, pieces, tree

SIZES = [ROW, 2 * ROW, 7 * ROW, (BUCKET + 5) * ROW]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_every_element_is_some_ranks_and_no_others(size, world):
    cut, owner = buckets(size, world), torch.full((size,), -1, dtype=torch.int8)
    for rank in range(world):
        taken = torch.zeros(sum(bucket.size for bucket in cut), dtype=torch.bool)
        for piece in pieces(cut, rank, 0, size):
            assert (owner[piece.after : piece.after + piece.length] == -1).all()
            owner[piece.after : piece.after + piece.length] = rank
            assert not taken[piece.mine : piece.mine + piece.length].any()
            taken[piece.mine : piece.mine + piece.length] = True
    assert (owner >= 0).all()
    assert all(bucket.world * bucket.size <= max(BUCKET, world) * ROW for bucket in cut)
    padding = sum(world * bucket.size for bucket in cut) - size
    assert 0 <= padding < world * ROW


def test_pieces_of_a_stretch_are_where_the_whole_has_them():
    """Across two buckets and several runs."""
    world, size = 4, (BUCKET + 9) * ROW
    cut = buckets(size, world)
    whole = torch.arange(size + world * ROW)
    start, length = 100 * ROW + 17, (BUCKET - 93) * ROW
    found = torch.full((length,), -1)
    for rank in range(world):
        rows = torch.cat([bucket.run(whole, rank) for bucket in cut])
        for piece in pieces(cut, rank, start, length):
            found[piece.after : piece.after + piece.length] = rows[piece.mine : piece.mine + piece.length]
    assert torch.equal(found, whole[start : start + length])


def leaves(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Numbers over eight decades: each order of adding them has bits of its own."""
    generator = torch.Generator().manual_seed(count)
    scale = 10.0 ** torch.randint(-4, 5, (count, 5000), generator=generator)
    return list((torch.randn(count, 5000, generator=generator) * scale).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_one_tree_for_any_number_of_ranks(count, dtype):
    parts = leaves(count, dtype)
    expected, order = tree(parts), torch.stack([part.float() for part in parts]).cumsum(0)[-1]
    assert (count < 4) == torch.equal(expected.float(), order), "the order is seen in the bits"
    for world in (1, 2, 4, 8):
        if count % world:
            continue
        mine, sums = count // world, []
        for rank in range(world):
            counter = Counter(mine)
            found = [counter.add(part) for part in parts[rank * mine : (rank + 1) * mine]]
            assert all(total is None for total in found[:-1])
            sums.append(found[-1].clone())
        assert torch.equal(tree(sums).float(), expected.float()), world


@pytest.mark.parametrize("count", [3, 5, 6, 7])
def test_other_numbers_of_leaves_are_added_up_too(count):
    parts, counter = leaves(count, torch.float32), Counter(count)
    exact = torch.stack(parts).double().sum(0)
    size = torch.stack(parts).abs().double().sum(0)
    for _ in range(2):  # buffers are used again
        found = [counter.add(part.clone()) for part in parts][-1]
        assert ((found.double() - exact).abs() <= 3e-7 * size).all()
    assert ((tree(parts).double() - exact).abs() <= 3e-7 * size).all()


def test_what_is_not_finite_stays_where_it_is():
    parts, counter = leaves(4, torch.float32), Counter(4)
    parts[2][7] = float("nan")
    for found in (tree(parts), [counter.add(part.clone()) for part in parts][-1]):
        assert found.isnan().nonzero().tolist() == [[7]]


def test_leaves_may_change_once_they_are_counted():
    parts, counter, local = leaves(4, torch.bfloat16), Counter(4), torch.empty(5000, dtype=torch.bfloat16)
    for part in parts:
        found = counter.add(local.copy_(part))
    local.zero_()
    assert torch.equal(found, tree(parts))
