"""The rivals of the bilevel loop: each way is trained for a few steps; budgets, the choice of settings, tables."""

from dataclasses import replace

import pytest
import torch

from benchmarks.quality.rival_cases import Plan, Recipe
from benchmarks.quality.rivals import Bench
from bilevel_fast.runs.config import preset


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    brief = preset("smoke")
    brief = replace(
        brief,
        lower=replace(brief.lower, steps=4, batch=2, warmup=0),
        upper=replace(brief.upper, every=2, batch=2, warmup=0),
        mini=replace(brief.mini, images=16, bank=2, bank_steps=1),
    )
    return Bench(Plan({}, erased=1, kept=1), 0, tmp_path_factory.mktemp("rivals"), brief)


WAYS = {
    "distilled": (Recipe("distilled"), (4, 0, 0)),
    "bilevel": (Recipe("loop"), (6, 2, 4)),
    "two-stage": (Recipe("two-stage"), (6, 2, 4)),
    "repair": (Recipe("repair", steps=1), (6, 1, 2)),
    "one level": (Recipe("one level", weight=0.5), (4, 4, 4)),
    "uce": (Recipe("uce"), (4, 0, 0)),
    "uce, all tokens": (Recipe("uce", all_tokens=True), (4, 0, 0)),
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
