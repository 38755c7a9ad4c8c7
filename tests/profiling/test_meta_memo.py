"""Ops on the meta device: what is remembered makes and costs what the op itself does."""

import pytest
import torch
from torch import nn

from bilevel_fast.profiling import meta_memo
from bilevel_fast.profiling.cost import AsOnGPU, Counter

ATEN = torch.ops.aten


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    monkeypatch.setattr(meta_memo, "_known", {})


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def told(t):
    return t.shape, t.stride(), t.dtype, t.device.type, t.untyped_storage().nbytes()


def net():
    with torch.device("meta"):
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 1)).bfloat16()


def test_the_second_pass_is_recalled_and_costs_the_same():
    model, x = net(), empty(2, 4, 6, 6, dtype=torch.bfloat16)

    def step():
        with Counter() as counter:
            out = model(x)
            out.sum().backward()
        return [told(out), *(told(p.grad) for p in model.parameters())], counter.costs

    first = step()
    known = len(meta_memo._known)
    model.zero_grad()
    assert step() == first
    assert len(meta_memo._known) == known > 5
    assert all(found.cost for found in meta_memo._known.values()), "each was counted"


def test_results_are_new_tensors():
    x = empty(3, 4)
    with AsOnGPU():
        one, other = x * 2, x * 2
    assert told(one) == told(other)
    assert len({t.untyped_storage()._cdata for t in (x, one, other)}) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: x.sum(0), lambda x: x.sum(1)),
        (lambda x: x.sum(0, keepdim=True), lambda x: x.sum(0, keepdim=False)),
        (lambda x: x + 1, lambda x: x.t() + 1),
        (lambda x: x + 1, lambda x: x.double() + 1),
        (lambda x: torch.cat([x, x]), lambda x: torch.cat([x, x, x])),
        (lambda x: torch.ones_like(x), lambda x: torch.ones_like(x, dtype=torch.int8)),
    ],
)
def test_calls_that_differ_are_kept_apart(one, other):
    x = empty(3, 4)
    want = [told(f(x)) for f in (one, other)]
    assert want[0] != want[1]
    with AsOnGPU():
        assert [told(f(x)) for f in (one, other, one, other)] == want * 2


def test_one_tensor_twice_is_read_once_and_two_are_read_twice():
    x, y = empty(3, 4), empty(3, 4)
    with Counter() as counter:
        _ = x + x, x + y, x + x, x + y
    assert [cost.bytes for cost in counter.costs] == [96, 144, 96, 144]


def test_what_changes_arguments_or_shows_them_or_is_elsewhere_is_not_remembered():
    x, here = empty(3, 4), torch.zeros(3, 4)
    with AsOnGPU():
        assert x.add_(1) is x
        view = x.view(12)
        assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
        assert torch.equal(here + 1, torch.ones(3, 4))
        torch.empty(3, device="meta")
    assert not meta_memo._known


def test_a_result_that_does_not_fill_its_storage_is_made_anew():
    out = torch.as_strided(empty(20), (2, 3), (8, 1))
    given = (empty(2, 3), 1)
    key = meta_memo.key(ATEN.add.Tensor, given, {})
    assert meta_memo.remember(key, given, {}, out) is None
    assert meta_memo.remember(key, given, {}, [empty(2), torch.zeros(2)]) is None
    assert meta_memo.recall(key) is None


def test_a_view_that_no_schema_declares_stays_one():
    """`_unsafe_view` says that its result is new."""
    x = empty(3, 4)
    with AsOnGPU():
        views = [ATEN._unsafe_view(x, [12]) for _ in range(2)]
    assert {t.untyped_storage()._cdata for t in views} == {x.untyped_storage()._cdata}
