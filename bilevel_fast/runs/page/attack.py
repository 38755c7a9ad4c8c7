"""The report of an attack on one model, `report.html` beside its `attack.json`."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from bilevel_fast.runs.attacked import Attacked, Seen
from bilevel_fast.runs.page import document
from bilevel_fast.runs.page.charts import SERIES, curves, number
from bilevel_fast.runs.page.document import code, image, legend, note, scrolling, section, table, tag

_SHARES = {"hit": "shows the concept", "content": "shows the rest"}


def report(
    name: str,
    says: str,
    found: Sequence[Attacked],
    steps: Sequence[Mapping[str, Any]],
    grid: bytes | None,
    command: Sequence[str],
) -> str:
    """The page: curves over the steps of the search, every prompt, images, the command.

    Args:
        name: Of the method.
        says: What it is.
        found: Every prompt.
        steps: Points of `attacked.curve`.
        grid: Images as a PNG; None without any.
        command: Words that carry it out again.
    """
    parts = []
    loss = curves("what the search makes small", "mean over prompts", {"loss": _series(steps, "loss")}, x="steps")
    if any("hit" in point for point in steps):
        drawn = {title: _series(steps, key) for key, title in _SHARES.items()}
        names = legend((title, kind) for title, kind in zip(drawn, SERIES, strict=False))
        shares = curves("images of the prompts found", "share of prompts", drawn, x="steps", zero=True)
        parts.append(section("On the way", names, tag("div", shares, loss, class_="charts")))
    else:
        parts.append(section("On the way", note("Nobody looked at images of this model."), loss))
    lines = [_line(each.caption, each.last) for each in found]
    head = ["caption of the image", "prompt found", "step", "loss", *_SHARES.values()]
    parts.append(section("Prompts", table(head, lines, label="Prompts", text=(1, 4, 5), wide=True)))
    if grid is not None:
        about = "Images of the bank; what the model paints for their captions; what it paints for the prompts found."
        parts.append(section("Images", note(about), scrolling("Images", image(grid, about))))
    parts.append(section("Run it again", code(shlex.join(command)), note("--out names a new folder.")))
    return document.page(f"Attack: {name}", *parts, lead=says)


def _line(caption: str, seen: Seen) -> list[object]:
    return [caption, seen.text, seen.step, number(seen.loss), _word(seen.hit), _word(seen.content)]


def _series(steps: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float | None]]:
    return [(point["step"], point.get(key)) for point in steps]


def _word(seen: bool | None) -> str:
    return {True: "yes", False: "no", None: "-"}[seen]
