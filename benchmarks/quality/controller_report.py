"""The controller against the best of the sweep: a table, and what it says in words.

A frontier point is told by four numbers, so what is compared is their sum, the `miss`:

    miss = concept_hit + (1 - content_kept) + (1 - other_style_hit) + fid / fid of the distilled student, same seed

shares of samples that are not as asked, and the FID in units of what distillation alone reaches. 1 is a student that
suppresses all, spoils nothing and looks as good as the distilled one. The best of the sweep is the case with the least
miss, averaged over seeds: chosen after the fact from all of them, which flatters the sweep where cases differ by noise.
"""

from collections import defaultdict
from statistics import mean
from typing import Any

METRICS = ("concept_hit", "content_kept", "other_style_hit", "fid")
CONTROLLED = "controller from "
WITHIN = 1.05
Row = dict[str, Any]


def miss(row: Row, distilled: Row) -> float:
    """See above; `distilled` is the distilled student's row of the same seed."""
    wrong = row["concept_hit"] + (1 - row["content_kept"]) + (1 - row["other_style_hit"])
    return wrong + row["fid"] / distilled["fid"]


def by_case(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """Rows by case and seed, only those of seeds whose distilled student was measured; with their `miss`."""
    distilled = {row["seed"]: row for row in rows if row["case"] == "distilled"}
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if row["seed"] in distilled:
            found[row["case"]][row["seed"]] = {**row, "miss": miss(row, distilled[row["seed"]])}
    return dict(found)


def common(cases: dict[str, dict[int, Row]]) -> list[int]:
    """Seeds that all cases have."""
    return sorted(set.intersection(*(set(found) for found in cases.values())))


def dominating(point: dict[int, Row], others: dict[str, dict[int, Row]], seeds: list[int]) -> list[str]:
    """Cases that are at least as good in every metric's mean, and better in one."""

    def costs(found: dict[int, Row]) -> list[float]:
        means = {name: mean(found[seed][name] for seed in seeds) for name in METRICS}
        return [means["concept_hit"], -means["content_kept"], -means["other_style_hit"], means["fid"]]

    mine = costs(point)
    found = {name: costs(other) for name, other in others.items()}
    return [name for name, theirs in found.items() if theirs != mine and all(map(float.__le__, theirs, mine))]


def table(rows: list[Row]) -> str:
    """Markdown: all cases by their miss, and the comparison in words; or that nothing was measured."""
    cases = by_case(rows)
    swept = {name: found for name, found in cases.items() if name.startswith("lambda ")}
    controlled = {name: found for name, found in cases.items() if name.startswith(CONTROLLED)}
    if not swept or not controlled or not (seeds := common({**swept, **controlled})):
        return "not measured"
    lines = [
        f"| seeds {', '.join(map(str, seeds))} | " + " | ".join(METRICS) + " | miss | upper steps: ran, moved |",
        "|---|" + "--:|" * (len(METRICS) + 2),
    ]
    averages = {name: mean(found[seed]["miss"] for seed in seeds) for name, found in cases.items()}
    for name in sorted(averages, key=averages.__getitem__):
        found = [cases[name][seed] for seed in seeds]
        cells = [_cell([row[metric] for row in found]) for metric in (*METRICS, "miss")]
        counts = ", ".join(f"{mean(row[key] for row in found):.0f}" for key in ("upper_steps", "upper_moves"))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {counts} |")
    best = min(swept, key=averages.__getitem__)
    lines += [
        "",
        f"Best of the sweep: {best}, miss {averages[best]:.3f}; worst: {max(averages[n] for n in swept):.3f}.",
    ]
    for name in controlled:
        ratio = averages[name] / averages[best]
        above = dominating(controlled[name], swept, seeds)
        verdict = "within 5 %" if ratio <= WITHIN else "not within 5 %"
        lines.append(
            f"The {name}: miss {ratio:.3f} of the best's, {verdict}; "
            f"{len(above)} of {len(swept)} swept cases are at least as good in every column and better in one."
        )
    places = {f"{row['device']}, torch {row['torch']}, commit {row['commit']}, {row['date']}" for row in rows}
    return "\n".join([*lines, "", "Measured on " + "; ".join(sorted(places)) + "."])


def _cell(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else "")
