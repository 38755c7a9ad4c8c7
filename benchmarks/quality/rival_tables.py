"""The tables of `rivals`: shares of all seeds' samples with Wilson's 95% interval, FID by seed and against the loop's.

The interval of a share takes the samples of all seeds as independent: it says what so many samples leave open, not what
another teacher, style or world would.
"""

from collections.abc import Sequence
from statistics import mean

from benchmarks.quality import attack_tables
from benchmarks.quality.attack_tables import NOT_MEASURED
from benchmarks.quality.rival_cases import EMOJI_TRIES, PLANS, TRIES, best, of_world, tried
from benchmarks.rows import Row
from bilevel_fast.base.tables import markdown, seeds_named, spread
from bilevel_fast.metrics.interval import wilson

LOOP = "bilevel"
"""The case that others are compared with."""
SHARES = {
    "concept_hit": ("erased style", "erased"),
    "content_kept": ("its content", "erased"),
    "other_style_hit": ("other styles", "kept"),
    "relative_hit": ("of these its relatives", "relatives"),
    "plain": ("drawn plain", "erased"),
}
"""Key of a share: heading, and which samples it is of."""
SHOWN = {
    "mini": {
        "0.80 of the MACs": ("main", "closed", "solvers", "esd"),
        "0.55 of the MACs": ("tight",),
        "0.80, another erased style: waves": ("other",),
        "0.80, the first expert of an APTP mixture in place of magnitude": ("expert",),
        "The null anchor": ("null",),
    },
    "emoji": {
        "0.80 of the MACs, noto erased": ("emoji", "emoji solvers", "emoji systems"),
        "0.80 of the MACs, twemoji erased at the settings chosen for noto": ("emoji other",),
    },
}
"""By world, the tables and the plans in each."""

Found = dict[str, dict[int, Row]]
"""By case and seed; of rows with the same the last counts."""


def found_in(rows: list[Row], plans: Sequence[str]) -> Found:
    """The rows of some plans: every case that they have, those without rows as well."""
    cases: Found = {case: {} for plan in plans for case in PLANS[plan].cases}
    for row in rows:
        if row["plan"] in plans and row["case"] in cases:
            cases[row["case"]][row["seed"]] = row
    return cases


def share(rows: Sequence[Row], key: str) -> str:
    """`0.02 (0.01..0.05)`: of all samples of the rows, with Wilson's interval."""
    counts = [row["samples"][SHARES[key][1]] for row in rows]
    value = sum(row[key] * n for row, n in zip(rows, counts, strict=True)) / sum(counts)
    low, high = wilson(100 * value, sum(counts))
    return f"{value:.2f} ({low / 100:.2f}..{high / 100:.2f})"


def against(found: dict[int, Row], loop: dict[int, Row]) -> list[float]:
    """FID less the loop's, by seed that both have: same start, batches and noise."""
    return [found[seed]["fid"] - loop[seed]["fid"] for seed in sorted(found.keys() & loop.keys())]


def budget(row: Row) -> str:
    """What a student has cost."""
    cost = [row[key] for key in ("lower_gradients", "upper_gradients", "concept_images")]
    return " / ".join(map(str, cost))


def table(rows: list[Row], plans: Sequence[str]) -> str:
    """A line for each case of some plans."""
    cases = found_in(rows, plans)
    loop = cases.get(LOOP, {})
    measured = [row for found in cases.values() for row in found.values()]
    keys = [key for key in SHARES if key != "relative_hit" or any(key in row for row in measured)]
    lines = []
    for case, found in cases.items():
        if not found:
            lines.append([case, *[NOT_MEASURED] * (len(keys) + 3)])
            continue
        seeds, some = sorted(found), [found[seed] for seed in sorted(found)]
        gaps = [] if case == LOOP else against(found, loop)
        gap = ", ".join(f"{value:+.1f}" for value in gaps) or "-"
        cells = [share(some, key) for key in keys]
        fid = spread([row["fid"] for row in some], 1)
        lines.append([f"{case}, {seeds_named(seeds)}", *cells, fid, gap, budget(some[0])])
    heads = (SHARES[key][0] for key in keys)
    return markdown(["", *heads, "FID", f"less {LOOP}'s, by seed", "L_ft / L_CU / concept images"], lines)


def tuning(rows: list[Row], families: Sequence[str]) -> str:
    """All tries, the losing ones as well."""
    lines = []
    for family in families:
        tries = tried(family, rows)
        taken = best(tries, rows) if tries else ""
        for case in TRIES[family]:
            if case not in tries:
                lines.append([case, *[NOT_MEASURED] * 5])
                continue
            row = next(row for row in reversed(rows) if row["case"] == case)
            keys = ("concept_hit", "content_kept", "other_style_hit", "fid")
            cells = [f"{row[key]:.2f}" for key in keys]
            lines.append([case + (" (taken)" if case == taken else ""), *cells, f"{tries[case]:.2f}"])
    return markdown(["seed 3", "erased style", "its content", "other styles", "FID", "miss"], lines)


def conflict(rows: list[Row]) -> str:
    """The cosine of both gradients on the way of the loop, in words."""
    some = [row["cosines"] for row in rows if row["case"] == LOOP and row.get("cosines")]
    if not some:
        return f"The cosine of both gradients: {NOT_MEASURED}."
    means = [mean(values) for values in zip(*some, strict=True)] if len({len(c) for c in some}) == 1 else some[0]
    first, last = mean(means[:5]), mean(means[-5:])
    least = min(min(values) for values in some)
    return (
        f"The cosine of grad L_CU and grad L_ft in the loop's upper steps, over {len(some)} runs: {first:+.2f} in the "
        f"first five, {last:+.2f} in the last five, {least:+.2f} at least."
    )


def report(rows: list[Row], world: str) -> str:
    """All tables of a world."""
    rows = of_world(rows, world)
    if not rows:
        return f"Nothing: {NOT_MEASURED}."
    parts = [f"{name}\n\n{table(rows, plans)}" for name, plans in SHOWN[world].items()]
    if world == "mini":
        parts.append(f"What an attacker with the weights gets back\n\n{attack_tables.tables(rows)}")
    families = [family for family in TRIES if (family in EMOJI_TRIES) == (world == "emoji")]
    parts.append(f"Tries on seed 3\n\n{tuning(rows, families)}")
    places = {f"{r['device']}, {r['threads']} thread{'s' * (r['threads'] != 1)}, torch {r['torch']}" for r in rows}
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    parts += [conflict(rows), f"Measured on {'; '.join(sorted(places))}, commits {commits}."]
    return "\n\n".join(parts)
