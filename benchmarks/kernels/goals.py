"""What the kernels are meant to reach on a GPU, and by how much they do or do not."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}

Row = dict[str, Any]
Case = dict[str, Row]  # the measured rows of one case, by provider


@dataclass(frozen=True)
class Goal:
    """A number that every case of an op should reach.

    Attributes:
        value: The number of one case; None where a rival that it needs was not measured.
        cases: Which cases it is about, by name.
    """

    op: str
    text: str
    least: float
    value: Callable[[Case], float | None]
    cases: Callable[[str], bool] = lambda name: True


def _roofline(case: Case) -> float | None:
    return case["triton"]["roofline"] if "triton" in case else None


def _passes(case: Case) -> float | None:
    """As `_roofline`, of the bytes that move where a tensor that L2 cannot hold is read once a pass.

    Two passes: forward they read x twice and write y, 3 for the 2 of the roofline; backward they read x and the
    gradient twice and write one, 5 for 3.
    """
    share = _roofline(case)
    if share is None:
        return None
    row = case["triton"]
    if row["numel"] * ITEMSIZE[row["dtype"]] <= row.get("l2_bytes", math.inf):
        return share
    return share * (5 / 3 if row["case"].endswith("bwd") else 3 / 2)


def _faster_than(*rivals: str) -> Callable[[Case], float | None]:
    """Over the fastest of those rivals that were measured."""

    def ratio(case: Case) -> float | None:
        times = [case[name]["value"] for name in rivals if name in case]
        return min(times) / case["triton"]["value"] if times and "triton" in case else None

    return ratio


def _pruned(name: str) -> bool:
    return "dense" not in name.split()


GOALS = (
    Goal("group_norm_silu", "share of copy bandwidth, two passes where L2 is too small", 0.80, _passes),
    Goal("group_norm_silu", "times torch.compile", 1.5, _faster_than("compile")),
    Goal("feature_kd", "share of copy bandwidth", 0.85, _roofline),
    Goal("adamw_ema", "share of copy bandwidth", 0.85, _roofline),
    Goal("structured_conv2d", "times cuDNN on the masked dense convolution", 1.0, _faster_than("torch"), _pruned),
    Goal("structured_conv2d", "times cuDNN on the sliced convolution", 0.8, _faster_than("sliced")),
    Goal(
        "pruned_attention",
        "times SDPA's best backend on sliced heads",
        0.9,
        _faster_than("sdpa_flash", "sdpa_cudnn", "sdpa_efficient"),
    ),
    Goal("geglu", "times torch.compile", 1.2, _faster_than("compile")),
)


@dataclass(frozen=True)
class Reached:
    """What was measured of a goal: its number by case. Empty: not measured."""

    goal: Goal
    values: dict[str, float]

    @property
    def count(self) -> int:
        """Cases that reach it."""
        return sum(value >= self.goal.least for value in self.values.values())

    @property
    def worst(self) -> str:
        """Name of the worst case."""
        return min(self.values, key=lambda name: self.values[name])


def reached(rows: list[Row]) -> list[Reached]:
    """Every goal, with what the rows of kernels say about it."""
    by_op: dict[str, dict[str, Case]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["value"] is not None:
            by_op[row["op"]][row["case"]][row["provider"]] = row
    found = []
    for goal in GOALS:
        numbers = {name: goal.value(case) for name, case in by_op[goal.op].items() if goal.cases(name)}
        found.append(Reached(goal, {name: value for name, value in numbers.items() if value is not None}))
    return found


def goals(rows: list[Row]) -> list[str]:
    """Markdown: each goal with the median and the worst case, or `not measured`."""
    lines = ["| op | goal | reached in | median | worst |", "|---|---|--:|--:|---|"]
    for found in reached(rows):
        goal, values = found.goal, found.values
        start = f"| {goal.op} | {goal.least:.2f} {goal.text} |"
        if not values:
            lines.append(f"{start} not measured | | |")
            continue
        worst = f"{values[found.worst]:.2f} in {found.worst}"
        middle = median(values.values())
        lines.append(f"{start} {found.count} of {len(values)} cases | {middle:.2f} | {worst} |")
    return lines
