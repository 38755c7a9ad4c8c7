"""How a training went, as charts: losses of both levels, speed, and everything else that was logged."""

from collections.abc import Mapping, Sequence
from typing import Any

from bilevel_fast.runs.page.charts import SERIES, Points, curves
from bilevel_fast.runs.page.document import Html, details, join, legend, note, tag
from bilevel_fast.runs.page.quality import MODELS

Stats = Mapping[str, Sequence[Mapping[str, Any]]]
"""Records of `stats.jsonl`, by training."""

_HEADER = ("step", "images", "seconds", "images_per_second", "nonfinite")
_TITLES = {
    "lower/diffusion": ("Diffusion loss", "lower level; SNR-weighted squared error"),
    "lower/output": ("Output distillation", "lower level; squared error to the teacher"),
    "lower/feature": ("Block distillation", "lower level; squared error to the teacher"),
    "lower/self_attention": ("Self-attention distillation", "lower level; squared error to the teacher"),
    "lower/layer": ("Layer distillation", "lower level; squared error to the teacher"),
    "lower/guided": ("Distillation of the guided output", "lower level; squared error to the teacher"),
    "lower/loss": ("Lower loss", "lower level; weighted sum of its terms"),
    "lower/grad_norm": ("Gradient norm", "lower level"),
    "lower/lr": ("Learning rate", "lower level"),
    "upper/suppression": ("Suppression loss", "upper level; squared error to the target"),
    "upper/penalty": ("Penalty", "upper level; the lower loss on lower images"),
    "upper/weights_held": ("Weights held", "upper level; lambda times the weighted square of how far they moved"),
    "upper/loss": ("Upper loss", "upper level; suppression and penalty"),
    "upper/grad_norm": ("Gradient norm", "upper level"),
    "upper/lr": ("Learning rate", "upper level"),
}
"""What is logged, and what it is: errors are means over a batch, as latents have no unit."""
_FIRST = ("lower/diffusion", "lower/output", "lower/feature", "lower/self_attention", "lower/layer", "lower/guided")
_FIRST += ("upper/suppression", "upper/penalty", "upper/weights_held")


def losses(stats: Stats) -> Html:
    """What both levels descend, over images seen; whatever else was logged is folded away."""
    terms = list(dict.fromkeys(key for rows in stats.values() for row in rows for key in row if key not in _HEADER))
    terms = [term for term in terms if any(type(row.get(term)) is float for rows in stats.values() for row in rows)]
    first = [term for term in _FIRST if term in terms]
    first = first or [term for term in terms if term.endswith("/loss")] or terms
    others = [term for term in terms if term not in first]
    parts = [_legend(stats), tag("div", *(_chart(term, stats) for term in first), class_="charts")]
    if others:
        charts = tag("div", *(_chart(term, stats) for term in others), class_="charts")
        parts.append(details(f"{len(others)} more: gradient norms, learning rates, ...", charts))
    bad: dict[str, int] = {}
    for rows in stats.values():
        for row in rows:
            for term, count in (row.get("nonfinite") or {}).items():
                bad[term] = bad.get(term, 0) + count
    if bad:
        what = ", ".join(f"{count} of {term}" for term, count in bad.items())
        parts.append(note(f"Values that were not finite are left out: {what}.", warn=True))
    return join(parts)


def speed(stats: Stats) -> Html:
    """Images per second over the time spent in steps, which goes on where a resumed run went on."""
    series = {
        MODELS.get(name, name): [(row["seconds"], row["images_per_second"]) for row in rows if "seconds" in row]
        for name, rows in stats.items()
    }
    chart = curves("Throughput", "images per second", series, x="seconds in steps", zero=True)
    return join((_legend(stats), tag("div", chart, class_="charts")))


def _legend(stats: Stats) -> Html:
    return legend((MODELS.get(name, name), kind) for name, kind in zip(stats, SERIES, strict=False))


def _chart(term: str, stats: Stats) -> Html:
    """A training that has not logged a term keeps its colour: it has an empty series."""
    title, about = _TITLES.get(term, (term, "as logged"))
    series: dict[str, Points] = {}
    for name, rows in stats.items():
        points = [(row["images"], row[term]) for row in rows if term in row and "images" in row]
        series[MODELS.get(name, name)] = points
    return curves(title, about, series, x="images seen")
