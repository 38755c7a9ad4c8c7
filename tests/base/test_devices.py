"""Which device a command computes on."""

import pytest
import torch

from bilevel_fast.base.devices import Ranks, pick_device
from bilevel_fast.base.errors import UserError


@pytest.mark.parametrize(("name", "current"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_a_gpu_that_is_named_becomes_the_current_one(monkeypatch, name, current):
    made, here = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, device: here(size))  # as if it were there
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(str(device)))
    assert pick_device(name) == torch.device(name)
    assert made == current


def test_what_is_not_there_is_refused_and_not_made_current(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: pytest.fail("made current"))
    with pytest.raises(UserError, match=r"^--device cuda:99: "):
        pick_device("cuda:99")


def test_ranks_share_leaves_side_by_side():
    assert [list(Ranks(rank, 2).leaves(6)) for rank in range(2)] == [[0, 1, 2], [3, 4, 5]]
    assert Ranks().leaves(1) == range(1)


@pytest.mark.parametrize(("world", "leaves"), [(2, 1), (2, 3), (4, 6)])
def test_leaves_that_cannot_be_shared_are_refused(world, leaves):
    with pytest.raises(UserError, match=f"^--scale.leaves is {leaves}: wanted a multiple of {world}, the processes"):
        Ranks(0, world).leaves(leaves)
