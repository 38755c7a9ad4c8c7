"""Parts of a page of HTML, and the page: one file without a script, which asks the network for nothing.

    document.page("A run", document.section("Quality", document.table(["", "FID"], [["student", "3.8"]])))

Parts are `Html`. Any other text that is put into them is escaped, so that what a user typed is shown and never run; the
page's own policy forbids scripts and requests besides. It is light or dark as the reader's system, and readable at the
width of a phone: what is wider, such as a table, scrolls in a region of its own that the keyboard reaches.
"""

import base64
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_STYLE = Path(__file__).with_name("style.css")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_VOID = ("img", "link", "meta")


class Html(str):
    """Markup; what is only a str is text, and gets escaped."""


def escape(value: object) -> Html:
    """Markup as it is, any other value as text."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[object]) -> Html:
    """Parts in a row, without a space between them."""
    return Html("".join(escape(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element.

    Args:
        name: Of the element.
        children: Markup or text.
        attributes: By name, `class_` for `class` and `_` for `-`; those that are None or False are left out, True is
            an attribute without a value.
    """
    shown = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            shown += f" {key.rstrip('_').replace('_', '-')}" + (
                "" if value is True else f'="{html.escape(str(value))}"'
            )
    return Html(f"<{name}{shown}>" if name in _VOID else f"<{name}{shown}>{join(children)}</{name}>")


def slug(title: str) -> str:
    """A title as the name of a place in the page."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def page(title: str, *parts: object, lead: object = "", footer: object = "") -> str:
    """The whole page; sections become the list of links below its heading.

    Args:
        title: Heads it.
        parts: Tiles, sections and the like.
        lead: One or two sentences below the title.
        footer: What made it.
    """
    body = join(parts)
    places = re.findall(r'<section id="([^"]+)"><h2>(.*?)</h2>', body)
    links = join(tag("li", tag("a", Html(name), href=f"#{place}")) for place, name in places)
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )
    header = tag(
        "header",
        tag("h1", title),
        tag("p", lead, class_="lead") if lead else "",
        tag("nav", tag("ul", links), aria_label="Sections") if places else "",
    )
    content = (header, tag("main", body), tag("footer", footer) if footer else "")
    return "<!doctype html>\n" + tag(
        "html", tag("head", *head), tag("body", tag("div", *content, class_="page")), lang="en"
    ) + "\n"  # fmt: skip


def section(title: str, *parts: object) -> Html:
    """A heading of the second order and what belongs to it."""
    return tag("section", tag("h2", title), *parts, id=slug(title))


def note(*parts: object, warn: bool = False) -> Html:
    """A small paragraph."""
    return tag("p", *parts, class_="note warn" if warn else "note")


def tiles(values: Iterable[tuple[str, str, object]]) -> Html:
    """Numbers that a reader wants first: what it is, the number, what it means."""
    cells = (
        tag("div", tag("dt", name), tag("dd", value, class_="value"), tag("dd", about, class_="about") if about else "")
        for name, value, about in values
    )
    return tag("dl", *cells, class_="tiles")


def unit(value: str, of: str) -> Html:
    """A number and its unit, which is smaller."""
    return join((value, " ", tag("small", of)))


def facts(values: Iterable[tuple[object, object]]) -> Html:
    """Names and what they are."""
    return tag("dl", *(join((tag("dt", name), tag("dd", value))) for name, value in values), class_="facts")


def table(
    head: Sequence[object],
    lines: Iterable[Sequence[object]],
    *,
    label: str,
    text: Sequence[int] = (),
    bars: Sequence[int] = (),
    wide: bool = False,
    tall: bool = False,
) -> Html:
    """A table whose first column names the line and whose others are numbers.

    Args:
        head: Of the columns.
        lines: Cells, as many as `head`.
        label: What a screen reader calls it.
        text, bars: Columns that hold text, or bars, from 0.
        wide: Cells may break into several lines.
        tall: It may be long, and scrolls in itself.
    """
    kinds = dict.fromkeys(text, "text") | dict.fromkeys(bars, "bar")

    def line(cells: Sequence[object]) -> Html:
        first, *others = cells
        return tag(
            "tr",
            tag("th", first, scope="row"),
            *(tag("td", cell, class_=kinds.get(column)) for column, cell in enumerate(others, 1)),
        )

    names = (tag("th", cell, scope="col", class_=kinds.get(column)) for column, cell in enumerate(head))
    top = tag("thead", tag("tr", *names))
    flags = [*["wide"] * wide, *["tall"] * tall, *["single"] * (len(bars) == 1)]
    return scrolling(label, tag("table", top, tag("tbody", *map(line, lines))), *flags)


def scrolling(label: str, part: Html, *classes: str) -> Html:
    """What may be wider than the page: it scrolls in itself, by the keyboard as well, and is called `label`."""
    return tag("div", part, class_=" ".join(["scroll", *classes]), tabindex="0", role="region", aria_label=label)


def details(summary: str, *parts: object) -> Html:
    """What is shown when it is asked for."""
    return tag("details", tag("summary", summary), *parts)


def legend(names: Iterable[tuple[str, str]]) -> Html:
    """Names of series, and the class of each: `one` to `four`, with `block` for an area."""
    return tag("ul", *(tag("li", name, class_=kind) for name, kind in names), class_="legend")


def image(data: bytes, alt: str, *, pixels: bool = False, width: int | None = None, height: int | None = None) -> Html:
    """A PNG within the page.

    Args:
        data: The file.
        alt: What it shows, for who does not see it.
        pixels: It is small, and its pixels should stay sharp when it is enlarged.
        width, height: Of the file, which keep its place until it is there.
    """
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return tag("img", src=source, alt=alt, width=width, height=height, class_="pixels" if pixels else None)


def code(text: str) -> Html:
    """A command, on one line that scrolls."""
    return tag("pre", tag("code", text), tabindex="0", role="region", aria_label="command")


def terminal(text: str) -> Html:
    """What a command printed; long lines are broken as a terminal breaks them."""
    return tag("pre", tag("code", text), class_="terminal")
