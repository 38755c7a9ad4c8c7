"""Pictures of benchmarks.report: plain HTML and SVG, coloured by CSS class: they work in the dark and on a phone."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 400, 300  # of an SVG's coordinates: a phone shows them about one to one
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 44

STYLE = """
:root { color-scheme: light dark; --ink: #24242b; --soft: #62626e; --line: #d9d9e0; --paper: #ffffff; --band: #f4f4f7;
  --c0: #0b63a8; --c1: #b8520a; --c2: #1c7a55; --c3: #8a3f8f; --c4: #8f6d00; --c5: #5d5d66; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6ea; --soft: #a3a3ae; --line: #3a3a43; --paper: #17171b;
  --band: #212127; --c0: #62b1ee; --c1: #f29a5b; --c2: #5cc79a; --c3: #d492d8; --c4: #d8b74a; --c5: #a8a8b2; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 62rem; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1rem 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.5rem 0 .25rem; }
p, figure { margin: .5rem 0; } p.soft, figcaption, caption { color: var(--soft); font-size: .875rem; }
caption { text-align: left; padding-bottom: .25rem; }
code { font-size: .875em; background: var(--band); padding: .1em .3em; border-radius: 3px; }
.none { background: var(--band); padding: .5rem .75rem; border-radius: 4px; }
.wide { overflow-x: auto; margin: .75rem 0 1.5rem; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
table { overflow-wrap: normal; } td:first-child { min-width: 6rem; overflow-wrap: break-word; }
th { font-weight: 600; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { width: 40%; min-width: 5rem; vertical-align: middle; }
.fill { display: block; height: .9rem; border-radius: 2px; background: var(--c5); min-width: 2px; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.fill.c0, .fill.c1, .fill.c2, .fill.c3, .fill.c4 { background: var(--c); }
.fill.hatched { background: repeating-linear-gradient(135deg, var(--c) 0 3px, transparent 3px 7px);
  border: 1px solid var(--c); }
svg { display: block; width: 100%; max-width: 32rem; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .grid { stroke: var(--line); } svg .roof { stroke: var(--ink); fill: none; }
svg .mark { fill: var(--c); stroke: var(--paper); stroke-width: .75; }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .25rem 0; padding: 0;
  font-size: .875rem; } ul.legend svg { display: inline-block; width: 12px; vertical-align: -1px; }
details { margin: .5rem 0; } summary { cursor: pointer; }
"""


@dataclass(frozen=True)
class Bar:
    """One line of a table of bars. Without a value there is no bar, and a single cell that says why."""

    label: str
    value: float | None
    cells: tuple[str, ...]
    color: int = 5
    hatched: bool = False


Look = tuple[int, int]
"""Number of a colour, number of a shape."""


@dataclass(frozen=True)
class Point:
    """One mark of a scatter plot; `series` names its entry of the legend."""

    x: float
    y: float
    series: str
    title: str


def escape(text: object) -> str:
    return html.escape(str(text))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), caption: str = "") -> str:
    """A table of plain text, columns in `numbers` aligned right. The last cell of a short row spans the rest."""

    def line(cells: Sequence[str], tag: str, scope: str = "") -> str:
        short, text = len(cells) < len(head), ""
        for i, cell in enumerate(cells):
            spans = short and i == len(cells) - 1
            kind = f" colspan={len(head) - i}" if spans else " class=n" if i in numbers else ""
            text += f"<{tag}{scope}{kind}>{escape(cell)}</{tag}>"
        return f"<tr>{text}</tr>"

    body = "".join(line(row, "td") for row in rows)
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<div class=wide><table>{title}{line(head, 'th', ' scope=col')}{body}</table></div>"


def bars(head: Sequence[str], found: Sequence[Bar], limit: float | None = None, caption: str = "") -> str:
    """A table whose last column draws each value as a bar.

    Args:
        head: Names of the label and of the cells.
        found: At least one.
        limit: The value of a full bar; the largest one if None. What is larger fills the column.
        caption: Above it.
    """
    full = limit or max((bar.value or 0.0 for bar in found), default=0.0) or 1.0
    body = ""
    for bar in found:
        if bar.value is None:
            cells = f"<td colspan={len(head)}>{escape(bar.cells[0])}</td>"
        else:
            kind = f"fill c{bar.color}{' hatched' if bar.hatched else ''}"
            fill = f'<span class="{kind}" style="width:{min(100.0, 100 * bar.value / full):.1f}%"></span>'
            cells = "".join(f"<td class=n>{escape(cell)}</td>" for cell in bar.cells)
            cells += f"<td class=bar aria-hidden=true>{fill}</td>"
        body += f"<tr><td>{escape(bar.label)}</td>{cells}</tr>"
    names = "".join(f"<th scope=col{' class=n' if i else ''}>{escape(name)}</th>" for i, name in enumerate(head))
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<div class=wide><table>{title}<tr>{names}<td class=bar aria-hidden=true></td></tr>{body}</table></div>"


def _mark(x: float, y: float, look: Look, title: str = "") -> str:
    """A dot, square, triangle or diamond, with a tooltip."""
    r, (color, shape) = 4.5, look
    path = {
        0: f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        1: f"M{x - 4:.1f} {y - 4:.1f}h8v8h-8z",
        2: f"M{x:.1f} {y - 5:.1f}l5 9h-10z",
        3: f"M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
    }[shape % 4]
    tip = f"<title>{escape(title)}</title>" if title else ""
    return f'<path class="mark c{color}" d="{path}">{tip}</path>'


def legend(series: Mapping[str, Look]) -> str:
    """What the marks stand for."""
    items = "".join(
        f'<li><svg viewBox="0 0 12 12" aria-hidden=true>{_mark(6, 6, look)}</svg> {escape(name)}</li>'
        for name, look in series.items()
    )
    return f"<ul class=legend>{items}</ul>"


def _svg(alt: str, body: str, height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role=img aria-label="{escape(alt)}">{body}</svg>'


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two others, four to nine of them."""
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (10, 5, 2, 1) if (high - low) / (step * factor) >= 4 or factor == 1)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def plane(
    points: Sequence[Point], series: Mapping[str, Look], x_name: str, y_name: str, diagonal: str, alt: str
) -> str:
    """A scatter plot with the line y = x, and its legend."""
    low = math.floor(10 * min(0.5, *(min(p.x, p.y) for p in points)) - 0.3) / 10
    high = math.ceil(10 * max(1.0, *(max(p.x, p.y) for p in points)) - 1e-9) / 10

    def place(x: float, y: float) -> tuple[float, float]:
        share_x, share_y = (x - low) / (high - low), (y - low) / (high - low)
        return LEFT + share_x * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share_y * (HEIGHT - TOP - BOTTOM)

    body = ""
    for tick in ticks(low, high):
        (x, y), (x0, y0), (x1, y1) = place(tick, tick), place(low, low), place(high, high)
        body += f'<path class=grid d="M{x:.1f} {y0:.1f}V{y1:.1f}M{x0:.1f} {y:.1f}H{x1:.1f}"/>'
        body += f'<text x="{x:.1f}" y="{y0 + 15:.1f}" text-anchor=middle>{tick:g}</text>'
        body += f'<text x="{x0 - 5:.1f}" y="{y + 4:.1f}" text-anchor=end>{tick:g}</text>'
    (x0, y0), (x1, y1) = place(low, low), place(high, high)
    body += f'<path class=roof stroke-dasharray="5 4" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>'
    turn = -math.degrees(math.atan2(y0 - y1, x1 - x0))
    at = place(low + 0.42 * (high - low), low + 0.42 * (high - low))  # below the line, where a mark is rare
    body += (
        f'<text transform="translate({at[0] + 6:.1f} {at[1] + 12:.1f}) rotate({turn:.1f})">{escape(diagonal)}</text>'
    )
    body += f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor=middle>{escape(x_name)}</text>'
    middle = (TOP + HEIGHT - BOTTOM) / 2
    body += f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor=middle>{escape(y_name)}</text>'
    body += "".join(_mark(*place(p.x, p.y), series[p.series], p.title) for p in points)
    return f"<figure>{_svg(alt, body)}{legend(series)}</figure>"


def strips(rows: Sequence[tuple[str, Sequence[Point]]], series: Mapping[str, Look], x_name: str, alt: str) -> str:
    """One strip of marks per row, x in shares from 0 to 1 (more is drawn at the right edge), and the legend."""
    left, space, lanes = 128, 26, list(series)
    height = TOP + space * len(rows) + BOTTOM

    def place(x: float) -> float:
        return left + min(1.08, x) / 1.1 * (WIDTH - left - RIGHT)

    bottom = TOP + space * len(rows)
    body = ""
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        kind = "roof" if tick == 1 else "grid"
        body += f'<path class={kind} d="M{place(tick):.1f} {TOP}V{bottom}"/>'
        body += f'<text x="{place(tick):.1f}" y="{bottom + 15}" text-anchor=middle>{tick:.0%}</text>'
    body += f'<text x="{(left + WIDTH) / 2}" y="{height - 8}" text-anchor=middle>{escape(x_name)}</text>'
    for i, (label, points) in enumerate(rows):
        y = TOP + space * (i + 0.5)
        body += f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor=end>{escape(label)}</text>'
        # each provider on a line of its own, so that equal shares do not hide each other
        for p in points:
            offset = (lanes.index(p.series) - (len(lanes) - 1) / 2) * min(6.0, 14 / max(1, len(lanes) - 1))
            body += _mark(place(p.x), y + offset, series[p.series], p.title)
    return f"<figure>{_svg(alt, body, height)}{legend(series)}</figure>"
