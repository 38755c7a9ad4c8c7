"""What the kernels are meant to reach on a GPU, and by how much they do or do not."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

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


def _faster_than(*rivals: str) -> Callable[[Case], float | None]:
    """Over the fastest of those rivals that were measured."""

    def ratio(case: Case) -> float | None:
        times = [case[name]["value"] for name in rivals if name in case]
        return min(times) / case["triton"]["value"] if times and "triton" in case else None

    return ratio


def _pruned(name: str) -> bool:
    return "dense" not in name.split()


GOALS = (
    Goal("group_norm_silu", "share of copy bandwidth", 0.80, _roofline),
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


def goals(rows: list[Row]) -> list[str]:
    """Markdown: each goal with the median and the worst case, or `not measured`."""
    by_op: dict[str, dict[str, Case]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["value"] is not None:
            by_op[row["op"]][row["case"]][row["provider"]] = row
    lines = ["| op | goal | reached in | median | worst |", "|---|---|--:|--:|---|"]
    for goal in GOALS:
        found = {name: goal.value(case) for name, case in by_op[goal.op].items() if goal.cases(name)}
        values = {name: value for name, value in found.items() if value is not None}
        start = f"| {goal.op} | {goal.least:.2f} {goal.text} |"
        if not values:
            lines.append(f"{start} not measured | | |")
            continue
        reached = sum(value >= goal.least for value in values.values())
        worst = min(values, key=lambda name: values[name])
        middle = median(values.values())
        lines.append(f"{start} {reached} of {len(values)} cases | {middle:.2f} | {values[worst]:.2f} in {worst} |")
    return lines
