"""Tables: aligned text for the terminal, markdown for pages."""

import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import mean

_SHOWN = 3  # names of a list before it is cut short


def aligned(lines: Sequence[Sequence[str]], numbers: bool = False, least: tuple[int, int] = (0, 0)) -> str:
    """Columns as wide as their widest cell, two spaces apart.

    Args:
        lines: Cells, the header among them; all lines have equally many.
        numbers: All columns but the first are numbers and end at the right. Without it the cells begin at the left,
            and the last one is not padded.
        least: The least widths of the first column and of the others.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths = [max(width, least[i > 0]) for i, width in enumerate(widths)]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        if numbers:
            return "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])])
        return "  ".join([*map(str.ljust, cells[:-1], widths), cells[-1]])

    return "\n".join(map(line, lines))


def fitted(lines: Sequence[Sequence[str]], width: int = 80) -> str:
    """Columns as of `aligned`, in lines of at most `width` characters: the last cell goes on below itself."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)][:-1]
    start = sum(widths) + 2 * len(widths)
    out: list[str] = []
    for *cells, last in lines:
        first, *rest = textwrap.wrap(last, max(width - start, 16), break_on_hyphens=False) or [""]
        out.append("  ".join([*map(str.ljust, cells, widths), first]).rstrip())
        out += [" " * start + line for line in rest]
    return "\n".join(out)


def table(rows: Mapping[str, Mapping[str, float]], percent: Collection[str] | None = None) -> str:
    """A line for each row, a column for each number of it.

    Args:
        rows: By name; all have the same columns.
        percent: Columns of shares, which are shown in percent, the others with as many digits as they need; None
            shows every number with three digits after the point.
    """
    columns = list(next(iter(rows.values())))

    def cell(column: str, value: float) -> str:
        if percent is None:
            return f"{value:.3f}"
        return f"{100 * value:.3g} %" if column in percent else f"{value:g}"

    cells = [[name, *(cell(column, row[column]) for column in columns)] for name, row in rows.items()]
    return aligned([["", *columns], *cells], numbers=True, least=(8, 15) if percent is None else (0, 0))


def listed(names: Sequence[str]) -> str:
    """The first few of the names and how many more there are; `none` without any."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f", and {more} more" if more > 0 else "") if names else "none"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table whose first column begins at the left and whose others end at the right."""
    rule = "|---|" + "--:|" * (len(head) - 1)
    first, *others = [f"| {' | '.join(cells)} |" for cells in (head, *lines)]
    return "\n".join([first, rule, *others])


def spread(values: Sequence[float], digits: int, seeds: int | None = None) -> str:
    """Mean and, of several values, half their range; says so if there are fewer than `seeds`."""
    if not values:
        return "not measured"
    half = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    note = "" if len(values) == (seeds or len(values)) else f" ({len(values)} of {seeds} seeds)"
    return f"{mean(values):.{digits}f}{half}{note}"


def seeds_named(seeds: Sequence[int]) -> str:
    """`seed 3`, `seeds 0, 1, 2`."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
