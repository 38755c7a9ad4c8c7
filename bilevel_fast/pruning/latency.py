"""A budget of time: what each site takes at each kept count, read from rows that measured it.

`benchmarks.speed.unet --sites --out sites.jsonl` times each distinct site at a few kept shares; rows of a model of
the hardware do as well, if they have the same fields (`suite`, `value` in ms, and in `config` `sites`, `kept`, `batch`,
`latent`, `text`, `align`). Between two measured counts time is interpolated. Below the smallest it stays what it was
there: nobody measured that more would be saved.

A Transformer is timed with its three width vectors narrowed together. What a step from one such row to the next saves
is divided among the three by the MACs that each of them gives up. So the measured rows are met exactly, and what lies
off their line is a model. That model cannot have a wider Transformer be quicker: where rows say so they are averaged
(isotonic regression), as such noise, divided, could make a time less than nothing. ResNets keep their rows as they are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.files import clip, read_json_lines, whole
from bilevel_fast.base.limits import TOKENS
from bilevel_fast.models.architecture import Site, UNetConfig, sites
from bilevel_fast.models.macs import SiteMacs, site_costs
from bilevel_fast.pruning.budget import Prices, SitePrice, check_share

SUITE = "unet_sites"
RESOLUTION = 1e9
"""Whole units of the budget per ms: picoseconds, so that rounding is far below what any clock shows."""
_SETTINGS = ("batch", "latent", "text", "align")
_FIELDS = {"sites": list, "kept": dict, **dict.fromkeys(_SETTINGS, int)}


@dataclass(frozen=True)
class SiteLatency:
    """Milliseconds of a site: `fixed` while it stands, and `widths[w][k]` for k kept units of width vector w, with
    units + 1 entries that need not ascend. Entries may be negative, but no sum of them with `fixed`; nothing reads [0].
    """

    fixed: float
    widths: Mapping[str, tuple[float, ...]]

    def ms(self, kept: Mapping[str, int]) -> float:
        """The whole site with `kept` units of each width vector."""
        return self.fixed + sum(self.widths[width][k] for width, k in kept.items())


LatencyTable = Mapping[str, SiteLatency]
"""By name of the site, all sites of a UNet."""


class ReadLatencies(dict[str, SiteLatency]):
    """A table from a file.

    Attributes:
        settings: What its rows were made with, in words: sizes, device, and whether they are a projection.
    """

    def __init__(self, table: LatencyTable, settings: str) -> None:
        super().__init__(table)
        self.settings = settings


@dataclass(frozen=True)
class LatencyBudget:
    """At most `ratio` of the time that the sites of the dense UNet take together, by `table`.

    What lies outside the sites (resamplers, first and last convolution) is not in the table and not in the budget.

    Raises:
        UserError: `ratio` or `min_keep` is outside (0, 1].
    """

    ratio: float
    table: LatencyTable
    min_keep: float = 0.25
    """Share of each width vector that stays in any case, rounded up to whole units."""

    def __post_init__(self) -> None:
        check_share("budget", self.ratio, "a share of the dense latency, ")
        check_share("min_keep", self.min_keep)

    def prices(self, config: UNetConfig) -> Prices:
        """Picoseconds of every site.

        Raises:
            UserError: The table lacks a site or a kept count, or has times that are not finite or sum up to less than
                nothing; the site is named.
        """
        sold = {}
        for site in sites(config):
            if site.name not in self.table:
                raise UserError(f"latency table: site {site.name} is missing")
            timed = self.table[site.name]
            for width in site.widths:
                has, wanted = len(timed.widths.get(width.name, ())), width.units + 1
                if has != wanted:
                    raise UserError(f"latency table: site {site.name}, {width.name!r}: {has} times, wanted {wanted}")
            times = [[timed.fixed], *(timed.widths[w.name][1:] for w in site.widths)]
            if not math.isfinite(sum(map(sum, times))) or sum(map(min, times)) < 0:
                raise UserError(f"latency table: site {site.name} takes a time that is negative or not finite")
            widths = {w.name: np.array(timed.widths[w.name]) * RESOLUTION for w in site.widths}
            whole = {name: np.rint(times).astype(np.int64) for name, times in widths.items()}
            # what even the quickest count takes is part of `fixed`: no count is at a negative price
            least = {name: times[1:].min() for name, times in whole.items()}
            fixed = round(timed.fixed * RESOLUTION) + int(sum(least.values()))
            sold[site.name] = SitePrice(max(fixed, 0), {name: times - least[name] for name, times in whole.items()})
        return Prices("latency", sold, 0)


def read_latencies(path: Path, config: UNetConfig, batch: int | None = None) -> ReadLatencies:
    """Read the rows of suite `unet_sites` in a file of JSON lines; of rows of the same site and counts the last counts.

    Args:
        path: The file.
        config: The dense UNet.
        batch: Use the rows of this batch only; needed if there are several.

    Raises:
        UserError: The file is missing or a line is no JSON object; a row lacks a field, has no positive time, or is
            about another UNet; rows were made with different settings; a site has no row, or none that is dense.
            Line or site is named.
    """
    rows = _rows(path, batch)
    if not rows:
        raise UserError(f"{path} has no rows of sites" + ("" if batch is None else f" at batch {batch}"))
    settings = {_settings(row) for row in rows}
    if len(settings) > 1:
        hint = "; --latency-batch picks one" if len({row["config"]["batch"] for row in rows}) > 1 else ""
        raise UserError(f"{path} has rows of several settings, wanted one: {'; '.join(sorted(settings)[:3])}{hint}")
    costs = site_costs(config, rows[0]["config"]["latent"], rows[0]["config"]["text"])
    known = {site.name: site for site in sites(config)}
    points: dict[str, dict[tuple[int, ...], float]] = {name: {} for name in known}
    for row in rows:
        for name in row["config"]["sites"]:
            if name not in known:
                of = f"; rows of {row['config']['model']}" if "model" in row["config"] else nearest(name, known)
                raise UserError(f"{path}:{row['line']}: no site {name!r} in this UNet{of}")
            points[name][_counts(row, known[name], path)] = row["value"]
    table = {name: _site(known[name], costs[name], found, path) for name, found in points.items()}
    return ReadLatencies(table, settings.pop())


def _settings(row: dict[str, Any]) -> str:
    found = [*(f"{k} {row['config'][k]}" for k in _SETTINGS), str(row.get("device"))]
    return ", ".join([*found, "projection"] if row.get("projection") else found)


def _rows(path: Path, batch: int | None) -> list[dict[str, Any]]:
    found = []
    for n, row in read_json_lines(path):
        if row.get("suite") != SUITE:
            continue
        settings, value = row.get("config"), row.get("value")
        settings = settings if isinstance(settings, dict) else {}
        for name, kind in _FIELDS.items():
            if type(settings.get(name)) is not kind:
                raise UserError(
                    f"{path}:{n}: config has {clip(settings.get(name))} for {name!r}, wanted {kind.__name__}"
                )
        if batch is not None and settings["batch"] != batch:
            continue
        for name in ("latent", "text"):
            whole(settings[name], f"{path}:{n}: {name}", 1, TOKENS)
        if any(type(name) is not str for name in settings["sites"]):
            raise UserError(f"{path}:{n}: config has {clip(settings['sites'])} for 'sites', wanted names")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
            raise UserError(f"{path}:{n}: value is {clip(value)}, wanted milliseconds")
        found.append({**row, "line": n})
    return found


def _counts(row: dict[str, Any], site: Site, path: Path) -> tuple[int, ...]:
    """Kept units of each width vector of the site that a row timed."""
    kept = row["config"]["kept"]
    for width in site.widths:
        count = kept.get(width.name)
        if type(count) is not int or not 1 <= count <= width.units:
            raise UserError(
                f"{path}:{row['line']}: {site.name} keeps {count!r} of {width.name!r}, wanted 1..{width.units}"
            )
    return tuple(kept[width.name] for width in site.widths)


def _site(site: Site, cost: SiteMacs, points: Mapping[tuple[int, ...], float], path: Path) -> SiteLatency:
    """Times at every kept count from those at some: (counts) -> ms."""
    full = tuple(width.units for width in site.widths)
    if full not in points:
        raise UserError(f"{path}: site {site.name} is not timed with all its units, {', '.join(map(str, full))}")
    line = sorted(points)
    steps = np.diff(line, axis=0)
    if (steps < 0).any():
        raise UserError(f"{path}: rows of site {site.name} narrow one width vector while they widen another")
    times = [points[counts] for counts in line]
    if len(site.widths) > 1:
        times = _isotonic(times)
    macs = steps * [cost.units[width.name].true for width in site.widths]
    saved = np.diff(times)[:, None] * macs / macs.sum(axis=1, keepdims=True)
    widths = {w.name: _interpolate(w.units, [p[i] for p in line], saved[:, i]) for i, w in enumerate(site.widths)}
    return SiteLatency(times[0], widths)


def _isotonic(values: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls, in least squares: neighbours that fall are pooled into their mean."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return [mean for mean, n in pools for _ in range(n)]


def _interpolate(units: int, counts: Sequence[int], steps: np.ndarray) -> tuple[float, ...]:
    """Sum of the steps up to each count 0..units; a count may repeat, the step between is then 0."""
    return tuple(np.interp(np.arange(units + 1), counts, [0.0, *np.cumsum(steps)]).tolist())
