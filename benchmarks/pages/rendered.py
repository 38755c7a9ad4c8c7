"""Generated Markdown as parts of a page of HTML: tables, paragraphs, and what stands between backticks or stars.

It reads what this package writes for README.md and docs/, not Markdown at large.
"""

import re

from bilevel_fast.runs.page.document import Html, join, table, tag

_INLINE = re.compile(r"`([^`]+)`|\*\*(.+?)\*\*")
_RULE = re.compile(r"\|(\s*:?-+:?\s*\|)+")
_NUMBERS = re.compile(r"[\d\s.,±%()x/+-]*(not measured|none|-)?")


def inline(text: str) -> Html:
    """`code` and **bold** within a line; all else is text."""
    parts: list[object] = []
    end = 0
    for match in _INLINE.finditer(text):
        parts += [text[end : match.start()], tag("code", match[1]) if match[1] else tag("strong", match[2])]
        end = match.end()
    return join([*parts, text[end:]])


def rendered(text: str, label: str) -> Html:
    """The parts, in their order; a table is called `label`.

    Args:
        text: Tables whose second line is a rule, and paragraphs of a line each.
        label: What a screen reader calls its tables.
    """
    lines, parts = text.splitlines(), []
    while lines:
        if lines[0].startswith("|") and len(lines) > 1 and _RULE.fullmatch(lines[1]):
            size = next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))
            parts.append(_table(lines[:size], label))
            lines = lines[size:]
        else:
            line = lines.pop(0).strip()
            if line:
                parts.append(tag("p", inline(line), class_="note"))
    return join(parts)


def _table(lines: list[str], label: str) -> Html:
    head, *rows = [_cells(line) for n, line in enumerate(lines) if n != 1]
    text = [
        column
        for column in range(1, len(head))
        if not all(_NUMBERS.fullmatch(row[column]) or _within(row[column]) for row in rows)
    ]
    long = any(len(cell) > 60 for row in rows for cell in row)
    shown = [[_cell(cell) for cell in row] for row in rows]
    return table([inline(cell) for cell in head], shown, label=label, text=text, wide=long)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def _within(cell: str) -> re.Match[str] | None:
    """`2.00 (1.91..2.12)`: a value and its quantiles, and perhaps what they are of."""
    return re.fullmatch(r"([\d.,]+) \(([\d.,]+)\.\.([\d.,]+)\)(.*)", cell)


def _cell(cell: str) -> Html:
    if found := _within(cell):
        return join((found[1], inline(found[4]), tag("small", f"{found[2]} to {found[3]}")))
    return inline(cell.replace("..", " to ") if re.fullmatch(r"\d+\.\.\d+", cell) else cell)
