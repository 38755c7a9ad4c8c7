"""Generated Markdown as parts of a page of HTML: tables, paragraphs, and what stands between backticks or stars.

It reads what this package writes for README.md and docs/, not Markdown at large.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bilevel_fast.runs.page.charts import interval, number, planned, ticks
from bilevel_fast.runs.page.document import Html, join, table, tag

_INLINE = re.compile(r"`([^`]+)`|\*\*(.+?)\*\*")
_RULE = re.compile(r"\|(\s*:?-+:?\s*\|)+")
_NUMBERS = re.compile(r"[\d\s.,±%()x/+-]*(not measured|not counted|none|-)?")


def inline(text: str) -> Html:
    """`code` and **bold** within a line; all else is text."""
    parts: list[object] = []
    end = 0
    for match in _INLINE.finditer(text):
        parts += [text[end : match.start()], tag("code", match[1]) if match[1] else tag("strong", match[2])]
        end = match.end()
    return join([*parts, text[end:]])


@dataclass(frozen=True)
class Bars:
    """Columns of a table that are drawn as well, all on one axis from 0.

    Attributes:
        columns: Their headings.
        mark: Where the axis has a line, such as 1 where we are as fast as others.
        projection: Nobody has measured them: they are dashed.
    """

    columns: Sequence[str]
    mark: float | None = None
    projection: bool = False


def rendered(text: str, label: str, bars: Bars | None = None) -> Html:
    """The parts, in their order; a table is called `label`.

    Args:
        text: Tables whose second line is a rule, and paragraphs of a line each.
        label: What a screen reader calls its tables.
        bars: What is drawn in them.
    """
    lines, parts = text.splitlines(), []
    while lines:
        if lines[0].startswith("|") and len(lines) > 1 and _RULE.fullmatch(lines[1]):
            size = next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))
            parts.append(_table([_cells(line) for n, line in enumerate(lines[:size]) if n != 1], label, bars))
            lines = lines[size:]
        else:
            line = lines.pop(0).strip()
            if line:
                parts.append(tag("p", inline(line), class_="note"))
    return join(parts)


def _table(lines: Sequence[Sequence[str]], label: str, bars: Bars | None) -> Html:
    head, *rows = lines
    found = [[_range(cell) for cell in row] for row in rows]
    drawn = [c for c, title in enumerate(head) if bars is not None and title in bars.columns]
    text = [
        c
        for c in range(1, len(head))
        if not all(_NUMBERS.fullmatch(row[c]) or values[c] for row, values in zip(rows, found, strict=True))
    ]
    most = _end([values[c] for values in found for c in drawn])

    def cell(column: int, shown: str, values: "_Range | None") -> Html:
        if values is None:
            return inline(shown)
        parts = list(values.shown())
        if column in drawn and bars is not None:
            low, value, high = values.low, values.value, values.high
            parts.append(planned(low, high, most) if bars.projection else interval(value, low, high, most, bars.mark))
        return join(parts)

    def title(column: int, shown: str) -> Html:
        if column not in drawn or bars is None:
            return inline(shown)
        line = "" if bars.mark is None else f", line at {number(bars.mark)}"
        return join((inline(shown), tag("small", f"axis 0 to {number(most)}{line}")))

    return table(
        [title(column, shown) for column, shown in enumerate(head)],
        [
            [cell(c, *pair) for c, pair in enumerate(zip(row, values, strict=True))]
            for row, values in zip(rows, found, strict=True)
        ],
        label=label,
        text=text,
        bars=drawn,
        wide=any(len(shown) > 60 for row in rows for shown in row),
    )


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@dataclass(frozen=True)
class _Range:
    """A cell that is a value within two others, or two values."""

    low: float
    value: float
    high: float
    main: str
    small: str

    def shown(self) -> Sequence[Html]:
        return [inline(self.main)] + ([tag("small", self.small)] if self.small else [])


_OF_QUANTILES = re.compile(r"([\d.,]+) \(([\d.,]+)\.\.([\d.,]+)\)(.*)")  # 2.00 (1.91..2.12), promised 1.25
_OF_SPREAD = re.compile(r"(-?[\d.,]+) ± ([\d.,]+)")  # 3.05 ± 0.21
_OF_TWO = re.compile(r"([\d.,]+)\.\.([\d.,]+)")  # 344..424


def _range(cell: str) -> _Range | None:
    if found := _OF_QUANTILES.fullmatch(cell):
        value, low, high = (_float(found[n]) for n in (1, 2, 3))
        return _Range(low, value, high, found[1] + found[4], f"{found[2]} to {found[3]}")
    if found := _OF_SPREAD.fullmatch(cell):
        value, half = _float(found[1]), _float(found[2])
        return _Range(max(value - half, 0.0), value, value + half, found[1], f"± {found[2]}")
    if found := _OF_TWO.fullmatch(cell):
        low, high = _float(found[1]), _float(found[2])
        return _Range(low, (low + high) / 2, high, f"{found[1]} to {found[2]}", "")
    return None


def _float(text: str) -> float:
    return float(text.replace(",", ""))


def _end(found: Sequence[_Range | None]) -> float:
    """The end of the axis of some ranges: a round number."""
    most = max((values.high for values in found if values is not None), default=1.0)
    marks = ticks(0.0, most)
    return marks[-1] if marks[-1] >= most else marks[-1] + marks[1] - marks[0]
