"""The rivals of the bilevel loop: each way is trained for a few steps; budgets, the choice of tuned settings, tables."""

import pytest
import torch

from benchmarks.quality.rival_cases import Plan, Recipe
from benchmarks.quality.rivals import Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    plan = Plan({}, erased=2, kept=1)
    return Bench(plan, 0, tmp_path_factory.mktemp("rivals"), "smoke")


WAYS = {
    "distilled": (Recipe("distilled"), (8, 0, 0)),
    "bilevel": (Recipe("loop"), (10, 2, 8)),
    "bome": (Recipe("loop", {"solver": "bome"}), (10, 2, 8)),
    "two-stage": (Recipe("two-stage"), (10, 2, 8)),
    "repair": (Recipe("repair", steps=1), (10, 1, 4)),
    "one level": (Recipe("one level", weight=0.5), (8, 8, 8)),
    "uce": (Recipe("uce"), (8, 0, 0)),
    "uce, all tokens": (Recipe("uce", all_tokens=True), (8, 0, 0)),
}


@pytest.mark.parametrize("case", WAYS)
def test_every_way_trains_from_the_same_start_and_says_what_it_cost(bench, case):
    recipe, cost = WAYS[case]
    student, found = bench.make(case, recipe)
    assert tuple(found[key] for key in ("lower_gradients", "upper_gradients", "concept_images")) == cost
    start = bench.lab.student().state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in student.state_dict().items())
    again, _ = bench.make(case, recipe)  # from the cache
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in again.state_dict().items())
