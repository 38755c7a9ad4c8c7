"""Two files of benchmark rows side by side: what got worse.

    python -m benchmarks.pages.compare old.jsonl new.jsonl
    python -m benchmarks.pages.compare old.jsonl new.jsonl --tolerance 0.05 --strict

Rows are joined by suite, case, provider, metric, config and device, and by op and dtype where they have them; of rows
with one key the last counts. A row is worse when its value moved the wrong way by more than the tolerance, unless both
20..80 % intervals overlap: that is noise. Exact counts, such as MACs, must not move at all. Different devices are never
compared, nor a projection with a measurement. A CPU with another number of threads is another device.

Exits with 1 if a row is worse.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks.rows import Row, config_text, is_projection, latest, number, read
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError

Direction = Literal["lower", "higher", "exact"]

# By metric, then by unit, in lower case: which way is better.
PATTERNS: dict[Direction, tuple[str, ...]] = {
    "exact": ("macs", "*_macs", "mac", "flops", "*_flops", "params", "parameters"),
    "higher": ("images_per_second", "img/s", "*mfu*", "*_faster_than_*", "*speedup*", "gb_per_s", "gb/s",
               "tflop_per_s", "tflop/s", "roofline"),
    "lower": ("ms", "us", "s", "seconds", "*_ms", "*_us", "*_seconds", "*gib", "*mib", "*bytes*", "*launches*",
              "*syncs*"),
}  # fmt: skip
FAILURES = ("worse", "changed", "direction unknown")
MISSING = ("only in old", "other device", "not measured")


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    old: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OLD")]
    """Rows to hold the others against."""
    new: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="NEW")]
    """Rows to judge."""
    tolerance: float = 0.03
    """Share by which a value may get worse."""
    strict: bool = False
    """Also fail when a measured row of `old` has no counterpart that can be compared."""


@dataclass(frozen=True)
class Line:
    """One row of the table.

    Attributes:
        row: The newer of the two rows, or the only one.
        old, new: Their values; None where there is no row, or a row without a value.
        verdict: One of same, better, within noise; of `FAILURES`; of `MISSING`; only in new; a projection.
        note: What the verdict leaves open.
    """

    row: Row
    old: float | None
    new: float | None
    verdict: str
    note: str = ""

    @property
    def change(self) -> float | None:
        """(new - old) / |old|; infinite where old is 0."""
        if self.old is None or self.new is None:
            return None
        difference = self.new - self.old
        return difference / abs(self.old) if self.old else math.copysign(math.inf, difference) if difference else 0.0


def direction(row: Row) -> Direction | None:
    """Which way is better; None if neither metric nor unit says so."""
    for name in (row["metric"], row.get("unit")):
        for found, patterns in PATTERNS.items():
            if any(fnmatch(str(name).lower(), pattern) for pattern in patterns):
                return found
    return None


def compare(old: Iterable[Row], new: Iterable[Row], tolerance: float) -> list[Line]:
    """One line per key of either side, in the order of `old`, then those that only `new` has."""
    before, after = latest(old), latest(new)
    elsewhere: dict[tuple[str, ...], list[str]] = {}
    for *name, place in after:
        elsewhere.setdefault(tuple(name), []).append(place)
    lines = []
    for full, row in before.items():
        if full in after:
            lines.append(judge(row, after[full], tolerance))
        elif full[:-1] in elsewhere:
            others = "; ".join(elsewhere[full[:-1]])
            lines.append(Line(row, row["value"], None, "other device", f"was {full[-1]}, now {others}: not compared"))
        else:
            lines.append(Line(row, row["value"], None, "only in old"))
    return lines + [Line(row, None, row["value"], "only in new") for full, row in after.items() if full not in before]


def judge(old: Row, new: Row, tolerance: float) -> Line:
    """Compare two rows of one key."""
    line = Line(new, old["value"], new["value"], "same")

    def said(verdict: str, note: str = "") -> Line:
        return Line(new, line.old, line.new, verdict, note)

    if is_projection(old) != is_projection(new):
        return said("projection", "against a measurement: not compared")
    if line.new is None and line.old is not None:
        return said("not measured", str(new.get("why") or new.get("reason") or ""))
    if line.old is None or line.new is None or line.change is None:
        return said("only in new" if line.new is not None else "same", "" if line.new is not None else "not measured")
    way = direction(new)
    if way == "exact":
        return said("same" if line.old == line.new else "changed", "exact")
    if abs(line.change) <= tolerance + 1e-12:  # 1 - 0.97 is more than 0.03 in binary
        return line
    if way is None:
        return said("direction unknown", f"teach benchmarks.pages.compare which way {new['metric']!r} is better")
    (low, high), (new_low, new_high) = _interval(old), _interval(new)
    if _has_interval(old) and _has_interval(new) and low <= new_high and new_low <= high:
        return said("within noise", f"{low:.4g}..{high:.4g}, {new_low:.4g}..{new_high:.4g}")
    return said("worse" if (line.change > 0) == (way == "lower") else "better")


def _has_interval(row: Row) -> bool:
    return row.get("p20") is not None and row.get("p80") is not None


def _interval(row: Row) -> tuple[float, float]:
    return (row["p20"], row["p80"]) if _has_interval(row) else (row["value"], row["value"])


def table(lines: list[Line]) -> str:
    """Aligned text, and a sentence that counts the verdicts."""
    head = ("suite", "case", "provider", "metric", "config", "old", "new", "change", "verdict")
    cells = [head] + [
        (
            line.row["suite"],
            " ".join(filter(None, (line.row.get("op"), line.row["case"], line.row.get("dtype")))),
            line.row["provider"],
            line.row["metric"],
            config_text(line.row),
            number(line.old),
            number(line.new),
            "" if line.change is None else f"{line.change:+.1%}",
            f"{line.verdict} ({line.note})" if line.note else line.verdict,
        )
        for line in lines
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = {5, 6, 7}
    text = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    counts: dict[str, int] = {}
    for line in lines:
        counts[line.verdict] = counts.get(line.verdict, 0) + 1
    total = f"{len(lines)} rows: " + ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    return "\n".join([*(line.rstrip() for line in text), "", total if lines else "no rows to compare"])


def failed(lines: Iterable[Line], strict: bool = False) -> bool:
    """Whether a row got worse; with `strict`, also whether one that was measured can no longer be compared."""
    bad = (*FAILURES, *MISSING) if strict else FAILURES
    return any(line.verdict in bad and (line.old is not None or line.verdict in FAILURES) for line in lines)


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.pages.compare", __doc__)
    if not 0 <= settings.tolerance < 1:
        raise UserError(f"--tolerance is {settings.tolerance}, wanted a share: 0.03 is 3 %")
    old, new = read(settings.old), read(settings.new)
    lines = compare(old, new, settings.tolerance)
    print(table(lines))
    for path, rows in ((settings.old, old), (settings.new, new)):
        without = sum("metric" not in row for row in rows)
        if without:
            print(f"{path}: {without} rows without a metric are not compared")
    if failed(lines, settings.strict):
        raise SystemExit(1)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
