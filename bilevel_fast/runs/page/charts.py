"""Curves as SVG, and bars within tables: drawn here, so that a page holds them as text, in its own colours.

    charts.curves("diffusion loss", "mean squared error", {"student": [(16, 0.5), (32, 0.4)]}, x="images seen")
    charts.bar(whole=1.0, part=0.8)

Every chart carries its numbers: what the pointer rests on says them, and a table below opens with the keyboard.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from bilevel_fast.runs.page.document import Html, details, join, table, tag

Points = Sequence[tuple[float, float | None]]
"""x and y, by rising x; a y that is None was not finite, and leaves a gap."""

SERIES = ("one", "two", "three", "four")
"""Classes of the style sheet, by the order of the series."""

_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 40
_SHOWN = 60
"""Points of a curve; of more, neighbours are averaged."""
_LOG_FROM = 12
"""Ratio of the largest value to the smallest from which an axis is logarithmic."""


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: `0.00123`, `12.3`, `1,234`, `12.3M`; at most `digits` that count, `-` for None."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 999_500:
        power = 9 if size >= 999.5e6 else 6
        return f"{value / 10**power:.{digits}g}{'G' if power == 9 else 'M'}"
    if size >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if size < 1e-4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}".rstrip("0").rstrip(".")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within low..high."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within low..high; with 2 and 5 times them where these would be few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 6)]
    return ticks(low, high)


def thinned(points: Points) -> list[tuple[float, float | None]]:
    """At most `_SHOWN` points: neighbours as their mean, without those that are None, at the last of their x."""
    size = math.ceil(len(points) / _SHOWN)
    found: list[tuple[float, float | None]] = []
    for start in range(0, len(points), max(size, 1)):
        some = points[start : start + size]
        values = [y for _, y in some if y is not None]
        found.append((some[-1][0], sum(values) / len(values) if values else None))
    return found


def curves(title: str, unit: str, series: Mapping[str, Points], *, x: str, zero: bool = False) -> Html:
    """A figure with a curve for each series; an empty one says that there are no values.

    Args:
        title: Above it.
        unit: Of y, below the title.
        series: By name, four at most.
        x: What x is, below its axis.
        zero: The y axis begins at 0.
    """
    assert len(series) <= len(SERIES)
    drawn = {name: thinned(points) for name, points in series.items()}
    values = [y for points in drawn.values() for _, y in points if y is not None]
    if not values:
        return _figure(title, unit, tag("p", "No finite values.", class_="note"))
    scale = _Scale(values, zero)
    right = max(at for points in drawn.values() for at, _ in points)
    along = _Along(right)
    parts = [_axes(scale, along, x)]
    for kind, points in zip(SERIES, drawn.values(), strict=False):
        parts.append(tag("g", *_curve(points, scale, along), class_=kind))
    parts.append(_readings(drawn, along))
    longest = max((len(points) for points in series.values()), default=0)
    means = f"; each point is the mean of {math.ceil(longest / _SHOWN)} records" if longest > _SHOWN else ""
    says = f"{title}, {unit}, over {x}: " + "; ".join(f"{name} {_trend(points)}" for name, points in drawn.items())
    svg = tag("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=says)
    return _figure(title, unit + (", log scale" if scale.log else "") + means, svg, _values(title, x, drawn))


def _figure(title: str, about: str, *parts: Html) -> Html:
    return tag("figure", tag("figcaption", title, tag("small", about)), *parts, class_="chart")


class _Scale:
    """Of y: from values to pixels. A linear axis ends at round numbers, a logarithmic one just beyond the values."""

    def __init__(self, values: Sequence[float], zero: bool) -> None:
        low, high = min(values), max(values)
        self.log = not zero and low > 0 and high / low >= _LOG_FROM
        if self.log:
            self.low, self.high = low / 1.2, high * 1.2
            self.ticks = log_ticks(self.low, self.high)
            return
        if zero or high == low:
            low, high = min(0.0, low), max(high, 0.0) or 1.0
        marks = ticks(low, high)
        step = marks[1] - marks[0] if len(marks) > 1 else high - low
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        self.ticks = [round(n * step, 12) for n in range(first, last + 1)]
        self.low, self.high = self.ticks[0], self.ticks[-1]

    def __call__(self, y: float) -> float:
        low, high, y = (math.log(v) for v in (self.low, self.high, y)) if self.log else (self.low, self.high, y)
        return _HEIGHT - _BOTTOM - (y - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


class _Along:
    """Of x, which begins at 0."""

    def __init__(self, right: float) -> None:
        self.right = right or 1.0

    def __call__(self, x: float) -> float:
        return _LEFT + x / self.right * (_WIDTH - _LEFT - _RIGHT)


def _axes(scale: _Scale, along: _Along, x: str) -> Html:
    bottom, parts = _HEIGHT - _BOTTOM, []
    parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=bottom, y2=bottom, class_="grid axis"))
    for value in scale.ticks:
        y = f"{scale(value):.1f}"
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", number(value), x=_LEFT - 6, y=f"{scale(value) + 4:.1f}", text_anchor="end"))
    for value in ticks(0, along.right):
        at = f"{along(value):.1f}"
        parts.append(tag("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="grid"))
        anchor = "end" if along(value) > _WIDTH - 2 * _RIGHT else "middle"
        parts.append(tag("text", number(value), x=at, y=bottom + 16, text_anchor=anchor))
    parts.append(tag("text", x, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 5, text_anchor="middle"))
    return join(parts)


def _curve(points: Points, scale: _Scale, along: _Along) -> list[Html]:
    path, pen = "", "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        path, pen = f"{path}{pen}{along(x):.1f} {scale(y):.1f}", "L"
    dots = [
        tag("circle", cx=f"{along(x):.1f}", cy=f"{scale(y):.1f}", r=2.5, class_="point")
        for x, y in points
        if y is not None and len(points) <= _SHOWN // 2
    ]
    return [tag("path", d=path, class_="curve"), *dots]


def _readings(drawn: Mapping[str, Points], along: _Along) -> Html:
    """A strip for each x that shows a line and says the values while the pointer rests on it."""
    read = _by_x(drawn)
    places, strips = sorted(read), []
    edges = [_LEFT, *((along(a) + along(b)) / 2 for a, b in pairwise(places)), _WIDTH - _RIGHT]
    for at, left, right in zip(places, edges[:-1], edges[1:], strict=True):
        says = f"{number(at, 6)}: " + ", ".join(f"{name} {number(y)}" for name, y in read[at].items())
        box = tag("rect", x=f"{left:.1f}", y=_TOP, width=f"{right - left:.1f}", height=_HEIGHT - _TOP - _BOTTOM)
        middle = f"{along(at):.1f}"
        mark = tag("line", x1=middle, x2=middle, y1=_TOP, y2=_HEIGHT - _BOTTOM)
        strips.append(tag("g", tag("title", says), box, mark, class_="at"))
    return join(strips)


def _by_x(drawn: Mapping[str, Points]) -> dict[float, dict[str, float | None]]:
    read: dict[float, dict[str, float | None]] = {}
    for name, points in drawn.items():
        for at, y in points:
            read.setdefault(at, {})[name] = y
    return read


def _values(title: str, x: str, drawn: Mapping[str, Points]) -> Html:
    read = _by_x(drawn)
    lines = [[number(at, 6), *(number(read[at].get(name), 4) for name in drawn)] for at in sorted(read)]
    return details("Values", table([x, *drawn], lines, label=f"{title}, values"))


def _trend(points: Points) -> str:
    values = [y for _, y in points if y is not None]
    return f"from {number(values[0])} to {number(values[-1])}" if values else "has no finite values"


def bar(whole: float, part: float) -> Html:
    """A part of a whole, both as shares of the width: what is there, and what is left of it."""
    return tag("span", _piece("whole", 0, whole), _piece("part", 0, part), aria_hidden="true")


def interval(value: float, low: float, high: float, most: float, mark: float | None = None) -> Html:
    """A dot and the interval about it, on an axis from 0 to `most`; `mark` is a line that others share."""
    pieces = [] if mark is None else [tag("i", class_="mark", style=f"left:{_percent(mark / most)}")]
    pieces.append(_piece("range", low / most, high / most))
    pieces.append(tag("i", class_="dot", style=f"left:{_percent(value / most)}"))
    return tag("span", *pieces, aria_hidden="true")


def planned(low: float, high: float, most: float) -> Html:
    """From 0 to the one, and dashed on to the other: nobody has measured it."""
    pieces = _piece("whole", 0, low / most), _piece("planned", low / most, high / most)
    return tag("span", *pieces, aria_hidden="true")


def _piece(kind: str, left: float, right: float) -> Html:
    return tag("i", class_=kind, style=f"left:{_percent(left)};width:{_percent(right - left)}")


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"
