"""State dicts as JSON and tensors, and back: keys of any plain type, tuples, tensors anywhere."""

import json

import pytest
import torch

from bilevel_fast.training.trees import pack, unpack


def test_there_and_back():
    a, b = torch.ones(2), torch.tensor(3.0)
    tree = {
        "state": {0: {"step": b, "m": a}, 1: {}},
        "groups": [{"lr": 1e-6, "betas": (0.9, 0.999), "dict": {"tensor": "name"}, "none": None, "on": True}],
        "nan": float("inf"), "é": ["x", (), [a]],
    }  # fmt: skip
    packed, tensors = pack(tree)
    assert list(tensors) == ["state/0/step", "state/0/m", "é/2/0"]
    assert tensors["state/0/m"] is a
    assert unpack(json.loads(json.dumps(packed)), tensors) == tree


def test_what_is_not_plain_is_refused():
    with pytest.raises(TypeError, match=r"^lower/done holds a set, wanted tensors and plain values$"):
        pack({"lower": {"done": {1}}})
