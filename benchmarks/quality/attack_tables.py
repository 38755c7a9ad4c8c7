"""Tables and curves of what attacks got back from the rivals' students; no torch."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.quality.rival_cases import ATTACKED
from benchmarks.rows import Row
from bilevel_fast.base.files import replacing
from bilevel_fast.base.tables import markdown, seeds_named

NOT_MEASURED = "not measured"
ATTACKS = {
    "concept vector": "strength",
    "inversion": "steps",
    "ring-a-bell": "generations",
    "mma": "steps",
    "unlearn-diff": "steps",
}
"""By name, what is counted on the way."""
Looks = dict[float, list[Row]]
"""What was got back, of each seed, by steps or strength."""


def looks(rows: Sequence[Row], attack: str) -> dict[str, tuple[list[int], Looks]]:
    """By case its seeds and looks of an attack; the cases that are attacked first, whether or not they have any.

    Where a seed was attacked twice, the last row counts.
    """
    found: dict[str, dict[int, list[Row]]] = {case: {} for case in ATTACKED}
    for row in rows:
        got = [one for one in row.get("got_back", ()) if one["attack"] == attack]
        if row["plan"] == "attack" and got:
            found.setdefault(row["case"], {})[row["seed"]] = got
    by_case = {}
    for case, seeds in found.items():
        at: Looks = {}
        for got in seeds.values():
            for one in got:
                at.setdefault(one["steps"] if "steps" in one else one["strength"], []).append(one)
        by_case[case] = (sorted(seeds), at)
    return by_case


def table(rows: Sequence[Row], attack: str) -> str:
    """A line for each case: style got back / content kept, as the attack goes on."""
    found = looks(rows, attack)
    points = sorted({point for _, at in found.values() for point in at})
    lines = []
    for case, (seeds, at) in found.items():
        if not seeds:
            lines.append([case, *[NOT_MEASURED] * max(1, len(points))])
            continue
        cells = [_both(at[point]) if point in at else "-" for point in points]
        lines.append([f"{case}, {seeds_named(seeds)}", *cells])
    heads = [f"{ATTACKS[attack]} {point:g}" for point in points] or [ATTACKS[attack]]
    return markdown([f"{attack}: style got back / content kept", *heads], lines)


def _both(some: Sequence[Row]) -> str:
    return " / ".join(f"{mean(one[key] for one in some):.2f}" for key in ("hit", "content"))


def tables(rows: Sequence[Row]) -> str:
    """One for each attack."""
    return "\n\n".join(table(rows, attack) for attack in ATTACKS)


def plot(rows: Sequence[Row], path: Path) -> None:
    """A panel for each attack that was carried out: the style got back as it goes on, and the content, dashed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn = {attack: looks(rows, attack) for attack in ATTACKS}
    drawn = {attack: found for attack, found in drawn.items() if any(seeds for seeds, _ in found.values())}
    if not drawn:
        return
    cases = list(dict.fromkeys(case for found in drawn.values() for case in found))
    figure, axes = plt.subplots(1, len(drawn), figsize=(3 * len(drawn), 3), layout="constrained", squeeze=False)
    for axis, (attack, found) in zip(axes[0], drawn.items(), strict=True):
        for case, (seeds, at) in found.items():
            for key, line in (("hit", "o-"), ("content", "o--")) if seeds else ():
                values = [mean(one[key] for one in at[point]) for point in sorted(at)]
                label = case if key == "hit" else None
                axis.plot(sorted(at), values, line, color=f"C{cases.index(case)}", markersize=3, label=label)
        axis.set(title=attack, xlabel=ATTACKS[attack], ylim=(-0.05, 1.05))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("style got back;\ncontent kept (dashed)")
    handles = {label: line for axis in axes[0] for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    with replacing(path) as file:
        figure.savefig(file, dpi=110)
    plt.close(figure)
