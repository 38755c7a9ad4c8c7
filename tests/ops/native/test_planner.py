"""The multiple-choice knapsack: optimal by brute force and by independent solvers, or honest about what it missed."""

import itertools
import os
import threading
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from bilevel_fast.base.errors import UserError
from bilevel_fast.ops.native import plan, planner

OPTION = st.tuples(st.integers(-3, 12), st.integers(-8, 8).map(lambda x: x / 4))  # quarters: sums are exact
GROUPS = st.lists(st.lists(OPTION, min_size=1, max_size=4), max_size=5)


def split(groups, unit=1):
    return [[c * unit for c, _ in group] for group in groups], [[v for _, v in group] for group in groups]


def totals(groups, choice):
    taken = [group[option] for group, option in zip(groups, choice, strict=True)]
    return sum((v for _, v in taken), 0.0), sum(c for c, _ in taken)


def best_of(groups, budget):
    """The highest value within the budget, None if there is no plan, and the least cost there is."""
    plans = [totals(groups, choice) for choice in itertools.product(*(range(len(g)) for g in groups))]
    return max((v for v, c in plans if c <= budget), default=None), min(c for _, c in plans)


def check(found, costs, values, budget):
    """What a plan says it costs and is worth is what its options cost and are worth."""
    assert found.cost == sum(int(c[i]) for c, i in zip(costs, found.choice, strict=True)) <= budget
    assert found.value == pytest.approx(sum(v[i] for v, i in zip(values, found.choice, strict=True)), rel=1e-14)


def hard(seed, groups=40, digits=7):
    """Values that are costs, all even, and an odd budget: the relaxation promises the budget, no plan keeps that."""
    costs = [np.array([0, 2 * c]) for c in np.random.default_rng(seed).integers(1, 10**digits, groups).tolist()]
    return costs, [c.astype(float) for c in costs], sum(int(c[1]) for c in costs) // 4 * 2 + 1


@settings(max_examples=300, deadline=None)
@given(GROUPS, st.integers(-8, 40), st.sampled_from([1, 10**11 + 3, 2**54 + 1]))
def test_equals_brute_force(groups, budget, unit):
    best, least = best_of(groups, budget)
    costs, values = split(groups, unit)
    budget = budget * unit + unit - 1  # buys no more
    if best is None:
        with pytest.raises(UserError, match=f"budget of {budget} units .* cheapest plan costs {least * unit}$"):
            plan(costs, values, budget)
        return
    found = plan(costs, values, budget)
    assert (found.value, found.cost) == totals(list(map(list, map(zip, costs, values))), found.choice)
    assert found.cost <= budget
    assert (found.value, found.gap) == (best, 0.0)


@pytest.mark.parametrize("length", [1, 2, 3, 6, 12])
def test_short_lists_find_a_plan_and_bound_the_best(length):
    """No plan is better by more than the gap."""
    rng, gaps = np.random.default_rng(length), []
    for _ in range(150):
        costs = [rng.integers(0, 1000, 4) for _ in range(7)]
        values = [c / 1000 + 0.1 * rng.random(4) for c in costs]
        least = sum(int(c.min()) for c in costs)
        budget = int(least + rng.random() * (sum(int(c.max()) for c in costs) - least))
        sums, worth = (np.stack(np.meshgrid(*x)).sum(0) for x in (costs, values))
        best = worth[sums <= budget].max()
        with patch.object(planner, "LENGTHS", (length,)):
            found = plan(costs, values, budget)
        check(found, costs, values, budget)
        assert 0.0 <= found.gap <= max(np.ptp(v) for v in values)  # no more than one step of a hull
        assert found.value - 1e-9 <= best <= found.value + found.gap + 1e-9
        gaps.append(found.gap)
    assert 0 < sum(gap > 0 for gap in gaps) < 150


@pytest.mark.parametrize(("seed", "count", "longest"), [(0, 30, 400), (1, 30, 400), (2, 70, 400), (3, 70, 10**6)])
def test_equals_an_integer_program(seed, count, longest):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 24, size=count)
    costs = [np.sort(rng.integers(0, longest, n)) for n in sizes]
    values = [np.sqrt(c / longest) * rng.uniform(0.5, 1.5, len(c)) for c in costs]  # dearer is mostly better
    budget = int(0.55 * sum(c[-1] for c in costs))

    flat_costs, flat_values = np.concatenate(costs), np.concatenate(values)
    one_each = np.repeat(np.eye(len(sizes)), sizes, axis=1)
    unit = budget / 1e4  # the solver's tolerances are absolute
    gold = milp(
        -flat_values,
        integrality=np.ones(len(flat_values)),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(flat_costs[None] / unit, -np.inf, budget / unit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    found = plan(costs, values, budget)
    assert found.value == pytest.approx(-gold.fun, abs=2e-6)
    assert found.gap == 0.0
    check(found, costs, values, budget)


@pytest.mark.parametrize("digits", [11, 12, 17])
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_search_over_both_halves(seed, digits):
    """Long costs, neither concave nor aligned."""
    rng = np.random.default_rng(seed)
    costs = [rng.integers(0, 10**digits, 6) for _ in range(12)]
    values = [np.sqrt(c / 10**digits) + 0.1 * rng.standard_normal(6) for c in costs]
    budget = sum(int(c.max()) for c in costs) // 2
    halves = []
    for half in (slice(0, 6), slice(6, 12)):
        grid = np.stack([c.ravel() for c in np.meshgrid(*costs[half])]).sum(0)
        halves.append((grid, np.stack([v.ravel() for v in np.meshgrid(*values[half])]).sum(0)))
    (left, left_value), (right, right_value) = halves
    order = np.argsort(right)
    best = np.maximum.accumulate(right_value[order])
    place = np.searchsorted(right[order], budget - left, side="right") - 1
    gold = (left_value + np.where(place >= 0, best[place], -np.inf)).max()
    found = plan(costs, values, budget)
    assert found.value == pytest.approx(gold, abs=1e-10)
    assert found.gap == 0.0
    check(found, costs, values, budget)


def test_takes_the_budget_to_the_last_unit():
    costs, values = [[0, 7], [0, 5]], [[0.0, 3.0], [0.0, 2.0]]
    assert plan(costs, values, 12) == ((1, 1), 5.0, 12, 0.0)
    assert plan(costs, values, 11) == ((1, 0), 3.0, 7, 0.0)
    half = 2**61 - 1
    assert plan([[0, half], [1, half + 1]], [[0.0, 3.0], [0.0, 2.0]], 2 * half) == ((1, 0), 3.0, half + 1, 0.0)
    assert plan([[0, half], [1, half + 1]], [[0.0, 3.0], [0.0, 2.0]], 2**70) == ((1, 1), 5.0, 2 * half + 1, 0.0)


def test_what_does_not_fit_has_no_say():
    """Neither in the bounds nor in what counts as equally good: here best value per cost first is not optimal."""
    costs, values = [[0, 2], [0, 3], [0, 10**6]], [[0.0, 3.0], [0.0, 4.0], [0.0, 1e30]]
    assert plan(costs, values, 3) == ((0, 1, 0), 4.0, 3, 0.0)


def test_nothing_to_decide():
    assert plan([], [], 0) == ((), 0.0, 0, 0.0)
    assert plan([[5], [3, 3]], [[-1.0], [2.0, 2.0]], 8) == ((0, 0), 1.0, 8, 0.0)  # of equal options the first


def test_size_of_sd21():
    """70 sites of 32 options, separable and concave, so the equal split is optimal."""
    widths = np.arange(1, 33)
    found = plan([50 * widths] * 70, [np.sqrt(widths)] * 70, 70 * 50 * 16)
    assert found.choice == (15,) * 70
    assert (found.cost, found.gap) == (56_000, 0.0)


def test_many_options():
    costs = np.arange(10_000)
    assert plan([costs, costs], [2.0 * costs, 1.0 * costs], 15_000) == ((9999, 5001), 24_999.0, 15_000, 0.0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_any_integers(dtype):
    assert plan([np.array([0, 200], dtype)] * 2, [[0, 1], [0, 2]], np.int64(300)) == ((0, 1), 2.0, 200, 0.0)


@pytest.mark.parametrize("unit", [2.0**-1000, 2.0**-40, 2.0**40, 2.0**1000])
def test_the_unit_of_values_does_not_matter(unit):
    """Nor what all options of a group are worth."""
    rng = np.random.default_rng(0)
    costs = [rng.integers(0, 10**12, 12) for _ in range(30)]
    values = [rng.integers(0, 2**40, 12) / 2.0**40 for _ in costs]
    budget = sum(int(c.max()) for c in costs) // 3
    found = plan(costs, values, budget)
    assert found.gap == 0.0
    scaled = plan(costs, [v * unit for v in values], budget)
    assert scaled == (found.choice, found.value * unit, found.cost, 0.0)
    assert plan(costs, [v + g for g, v in enumerate(values)], budget).choice == found.choice
    with patch.object(planner, "LENGTHS", (1,)):
        short = plan(costs, values, budget)
        assert short.gap > 0.0
        assert plan(costs, [v * unit for v in values], budget).gap == short.gap * unit


def test_a_plan_that_is_not_proven_says_so():
    """The best is one unit below the budget, as all costs are even. It is found, and the bound is the budget."""
    costs, values, budget = hard(0)
    found = plan(costs, values, budget)
    check(found, costs, values, budget)
    assert (found.value, found.gap) == (budget - 1, 1.0)
    assert plan(costs, values, budget) == found
    costs, values, budget = hard(1, groups=16)  # fewer plans than states: proven
    found = plan(costs, values, budget)
    assert found.gap == 0.0
    check(found, costs, values, budget)


def test_short_lists_are_of_states_that_differ():
    """Where all bounds are equal, the plan of a few states is nearly as good as that of many."""
    rng = np.random.default_rng(0)
    costs = [2 * rng.integers(1, 10**7, 24) for _ in range(70)]
    budget = sum(int(c.max()) for c in costs) // 2
    with patch.object(planner, "LENGTHS", (2**8,)):
        found = plan(costs, [c.astype(float) for c in costs], budget)
    assert found.value >= (1 - 1e-4) * budget
    assert found.value + found.gap == pytest.approx(budget, rel=1e-12)


def test_states_of_all_lists_are_bounded():
    rng = np.random.default_rng(0)
    costs = [rng.integers(0, 1000, 8) for _ in range(20)]
    values = [np.sqrt(c) * rng.uniform(0.5, 1.5, 8) for c in costs]
    best = plan(costs, values, 6000)
    assert best.gap == 0.0
    for states in (1, 39):  # one per list
        with patch.object(planner, "MAX_STATES", states):
            found = plan(costs, values, 6000)
        assert found.value < best.value <= found.value + found.gap


def watched(function, look):
    """What `look` saw in the middle half of the time in which another thread was in `function`."""
    times, seen = [], []

    def work():
        times.append(time.perf_counter())
        function()
        times.append(time.perf_counter())

    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        time.sleep(0.002)
        seen.append((time.perf_counter(), look()))
    start, end = times
    return [found for when, found in seen if start + 0.25 * (end - start) < when < start + 0.75 * (end - start)]


def test_other_threads_run_meanwhile():
    costs, values, budget = hard(2)
    assert len(watched(lambda: plan(costs, values, budget), lambda: None)) > 3


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_options():
    """Four million states would take 160 MB."""
    rng = np.random.default_rng(0)
    costs = [2 * rng.integers(1, 10**9, 1000) for _ in range(3)]
    budget = sum(int(c.max()) for c in costs) // 4 * 2 + 1

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    with patch.object(planner, "LENGTHS", (2**12,)):
        seen = watched(lambda: plan(costs, [c.astype(float) for c in costs], budget), resident)
    assert max(seen) - before < 40e6


@pytest.mark.parametrize(
    ("costs", "values", "message"),
    [
        ([[1, 2]], [], "1 groups of costs, 0 of values"),
        ([[1, 2]], [[1.0]], r"group 0 has costs of shape \(2,\) and values of shape \(1,\), wanted \(options,\)"),
        ([[[1]]], [[[1.0]]], r"group 0 has costs of shape \(1, 1\)"),
        ([[1], []], [[1.0], []], "group 1 has no options"),
        ([[1.5]], [[1.0]], "group 0 has costs in float64, wanted whole units"),
        ([[2**70]], [[1.0]], "group 0 has costs in object, wanted whole units"),
        ([[1]], [[float("nan")]], "group 0 has a value that is not finite"),
        ([[1], [1]], [[0.0], [float("-inf")]], "group 1 has a value that is not finite"),
        ([[0, 2**61], [-(2**61), 0]], [[0.0, 1.0]] * 2, "costs sum up to 4611686018427387904, wanted less than"),
        ([[2**63]], [[0.0]], "costs sum up to 9223372036854775808, wanted less than"),
        ([[-(2**63)]], [[0.0]], "costs sum up to 9223372036854775808, wanted less than"),
        ([[0, 1]] * 2, [[0.0, 8e307]] * 2, "values are too large to be added up"),
    ],
)
def test_refuses(costs, values, message):
    with pytest.raises(UserError, match=message):
        plan(costs, values, 2**40)
