"""Which device a command computes on."""

import pytest
import torch

from bilevel_fast.base.devices import pick_device
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
