import pytest
import torch

from bilevel_fast.models.conditioning import extra_rows, pack, unpack, with_sizes


@pytest.mark.parametrize(
    ("width", "pooled", "rows"), [(2048, 1280, 1), (32, 32, 2), (38, 32, 1), (4, 8, 4), (768, 0, 0)]
)
def test_rows_hold_the_pooled_state_and_the_sizes(width, pooled, rows):
    assert extra_rows(width, pooled) == rows


@pytest.mark.parametrize(("width", "pooled"), [(2048, 1280), (32, 32), (4, 8)])
def test_what_was_packed_is_found_again(width, pooled):
    states, pool, sizes = torch.randn(2, 5, width), torch.randn(2, pooled), torch.randn(2, 6)
    text = pack(states, pool, sizes)
    assert text.shape == (2, 5 + extra_rows(width, pooled), width)
    found, extra = unpack(text, pooled)
    assert torch.equal(found, states)
    assert torch.equal(extra.pooled, pool)
    assert torch.equal(extra.sizes, sizes)


def test_sizes_are_replaced_and_nothing_else():
    states, pool = torch.randn(2, 5, 8), torch.randn(2, 4)
    new = with_sizes(pack(states, pool, torch.zeros(2, 6)), 4, torch.arange(12.0).reshape(2, 6))
    assert torch.equal(new, pack(states, pool, torch.arange(12.0).reshape(2, 6)))
