import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from bilevel_fast.errors import UserError
from bilevel_fast.native import plan

OPTION = st.tuples(st.integers(0, 12), st.integers(-8, 8).map(lambda x: x / 4))  # quarters: sums are exact
GROUPS = st.lists(st.lists(OPTION, min_size=1, max_size=4), max_size=5)


def split(groups):
    return [[c for c, _ in group] for group in groups], [[v for _, v in group] for group in groups]


def totals(groups, choice):
    taken = [group[option] for group, option in zip(groups, choice, strict=True)]
    return sum(v for _, v in taken), sum(c for c, _ in taken)


@settings(max_examples=300)
@given(GROUPS, st.integers(0, 40))
def test_equals_brute_force(groups, budget):
    plans = [totals(groups, choice) for choice in itertools.product(*(range(len(g)) for g in groups))]
    affordable = [(value, cost) for value, cost in plans if cost <= budget]
    if not affordable:
        least = min(cost for _, cost in plans)
        with pytest.raises(UserError, match=f"budget of {budget} units .* cheapest plan costs {least}$"):
            plan(*split(groups), budget)
        return
    found = plan(*split(groups), budget)
    assert (found.value, found.cost) == totals(groups, found.choice)
    assert (found.value, -found.cost) == max((value, -cost) for value, cost in affordable)


@pytest.mark.parametrize("seed", range(4))
def test_equals_an_integer_program(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 24, size=30)
    costs = [np.sort(rng.integers(0, 400, n)) for n in sizes]
    values = [np.sqrt(c) * rng.uniform(0.5, 1.5, len(c)) for c in costs]  # dearer is mostly better
    budget = int(0.55 * sum(c[-1] for c in costs))

    flat_costs, flat_values = np.concatenate(costs), np.concatenate(values)
    one_each = np.repeat(np.eye(len(sizes)), sizes, axis=1)
    gold = milp(
        -flat_values,
        integrality=np.ones(len(flat_values)),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(flat_costs[None].astype(float), -np.inf, budget),
        ],
        options={"mip_rel_gap": 0.0},
    )
    found = plan(costs, values, budget)
    assert found.value == pytest.approx(-gold.fun, rel=1e-9)
    assert found.cost == sum(c[i] for c, i in zip(costs, found.choice, strict=True)) <= budget


def test_takes_the_budget_to_the_last_unit():
    costs, values = [[0, 7], [0, 5]], [[0.0, 3.0], [0.0, 2.0]]
    assert plan(costs, values, 12) == ((1, 1), 5.0, 12)
    assert plan(costs, values, 11) == ((1, 0), 3.0, 7)


def test_size_of_sd21():
    """70 sites of 32 options, a table 52,500 wide: separable and concave, so the equal split is optimal."""
    widths = np.arange(1, 33)
    costs, values = [50 * widths] * 70, [np.sqrt(widths)] * 70
    found = plan(costs, values, 70 * 50 * 16)
    assert found.choice == (15,) * 70
    assert found.cost == 56_000


def test_a_costly_option_is_not_reached_by_the_cap_on_the_table():
    assert plan([[3, 1000]], [[1.0, 2.0]], 10**12) == ((1,), 2.0, 1000)
    assert plan([[1000, 1001]], [[1.0, 2.0]], 1000) == ((0,), 1.0, 1000)


def test_many_options():
    costs = np.arange(1000)
    assert plan([costs, costs], [2.0 * costs, 1.0 * costs], 1500) == ((999, 501), 2499.0, 1500)
