"""What models are worth, as parts of a page: samples side by side, and a table of what was counted on them."""

from collections.abc import Iterable, Mapping, Sequence

from bilevel_fast.metrics.interval import wilson
from bilevel_fast.runs.page.charts import number
from bilevel_fast.runs.page.document import Html, image, join, note, table, tag
from bilevel_fast.runs.page.record import Sample

MODELS = {
    "teacher": "dense teacher",
    "distilled": "distilled only",
    "student": "bilevel student",
}
"""What the models of a run are called on a page."""

METRICS = {
    "concept_hit": ("erased concept drawn", "↓"),
    "content_kept": ("its content kept", "↑"),
    "other_style_hit": ("other styles drawn", "↑"),
    "object": ("object as asked", "↑"),
    "color": ("colour as asked", "↑"),
    "fid": ("FID", "↓"),
}
"""Names of metrics and which way is better; others go by their own names."""

_INTERVALS = (
    "Below each share is its 95 % interval by Wilson's score: what so few images leave open. Other numbers have none, "
    "and what another seed would change is in none."
)
_SAME_IMAGES = {"fid": "other_style_hit"}
"""Metrics that are no shares, and the share that is counted on the same images."""


def samples(found: Sequence[Sample], erased: Iterable[str]) -> Html:
    """Prompts, each with what every model drew for it: first those that name what was erased."""
    names = tuple(erased)
    gone = [sample for sample in found if any(name in sample.prompt for name in names)]
    kept = [sample for sample in found if sample not in gone]
    parts: list[Html] = []
    for title, some in (("Prompts that ask for what was erased", gone), ("Other prompts", kept)):
        if some:
            parts += [tag("h3", title), tag("ul", *map(_row, some), class_="samples")]
    return join(parts)


def _row(sample: Sample) -> Html:
    pictures = (
        tag(
            "figure",
            image(data, f"{sample.prompt}, drawn by the {MODELS.get(model, model)}", pixels=_size(data) < 128),
            tag("figcaption", MODELS.get(model, model)),
        )
        for model, data in sample.images.items()
    )
    return tag("li", tag("p", sample.prompt), tag("div", *pictures, class_="row"))


def _size(png: bytes) -> int:
    """Width in pixels."""
    return int.from_bytes(png[16:20], "big")


def quality(rows: Mapping[str, Mapping[str, float]], shares: Mapping[str, int]) -> Html:
    """A line for each model; shares in percent with their interval, in the heading of how many images.

    Args:
        rows: Values by model and metric; all have the same metrics.
        shares: For each metric that is a share: of how many images.
    """
    metrics = list(next(iter(rows.values())))

    def head(metric: str) -> Html:
        name, better = METRICS.get(metric, (metric, ""))
        count = shares.get(_SAME_IMAGES.get(metric, metric))
        about = better if count is None else f"{better} of {count} images"
        return join((name, tag("small", about.strip()) if about.strip() else ""))

    def cell(metric: str, value: float) -> object:
        if metric not in shares:
            return number(value)
        low, high = wilson(100 * value, shares[metric])
        return join((percent(value), tag("small", f"{low:.0f} to {high:.0f}")))

    lines = [[MODELS.get(name, name), *(cell(metric, row[metric]) for metric in metrics)] for name, row in rows.items()]
    parts = [table(["", *map(head, metrics)], lines, label="Quality")]
    if shares:
        parts.append(note(_INTERVALS))
    return join(parts)


def hits(rows: Mapping[str, Mapping[str, float]], count: int | None) -> Html:
    """How often each model draws each erased concept, where there are several."""
    names = list(next(iter(rows.values())))
    each = None if count is None else count // len(names)
    head = [join((name, tag("small", f"↓ of {each} images") if each else "")) for name in names]
    lines = [[MODELS.get(model, model), *(percent(row[name]) for name in names)] for model, row in rows.items()]
    return table(["erased concept drawn", *head], lines, label="Each erased concept")


def percent(share: float) -> str:
    """`0 %`, `99.4 %`, `100 %`."""
    return f"{100 * share:.1f}".removesuffix(".0") + " %"
