"""Pictures of pages for docs/reports.md, taken by a browser, none above 150 kB:

    make train 2>&1 | tee train.txt
    python -m benchmarks.pages.screenshots runs/mini train.txt

Writes docs/images/: the report of the run in light, in dark and as wide as a phone; the page of benchmarks, made anew
from the committed rows; and what the run printed.
"""

import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks import ROOT
from benchmarks.pages import site
from benchmarks.pages.browser import Browser
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_file, write_atomic
from bilevel_fast.models.folder import load_folder
from bilevel_fast.runs.page import document
from bilevel_fast.runs.page.training import report

MOST = 150_000
"""Bytes of a picture."""


@dataclass(frozen=True)
class Settings:
    """What is shown."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished run."""
    printed: Annotated[Path, tyro.conf.Positional]
    """File with what the run printed."""
    out: Path = ROOT / "docs" / "images"
    """Folder of the pictures."""


@dataclass(frozen=True)
class Shot:
    """A picture of a part of a page.

    Attributes:
        name: Of its file.
        page: Name of the page.
        width, height: Of the part, in pixels.
        top: Selector of where it begins; by default at the top of the page.
        dark: Whether the page is.
    """

    name: str
    page: str
    width: int
    height: int
    top: str = ""
    dark: bool = False


SHOTS = (
    Shot("report-light", "report", 1200, 1560),
    Shot("report-dark", "report", 1200, 1500, "#quality", dark=True),
    Shot("report-phone", "report", 390, 1400),
    Shot("report-phone-dark", "report", 390, 1400, "#losses", dark=True),
    Shot("benchmarks", "benchmarks", 1200, 1500),
    Shot("benchmarks-projections", "benchmarks", 1200, 900, "#projections-not-measurements", dark=True),
    Shot("train", "train", 1080, 0),
)


def pictures(pages: dict[str, Path]) -> Iterator[tuple[str, bytes]]:
    """Names and PNGs of all shots, one browser for all.

    Args:
        pages: Files, by name.

    Raises:
        UserError: There is no browser.
    """
    with Browser.start() as browser:
        for shot in SHOTS:
            with browser.tab(pages[shot.page], shot.width, dark=shot.dark) as tab:
                whole = tab.read("document.documentElement.scrollHeight")
                find = f"document.querySelector({shot.top!r}).getBoundingClientRect().top + scrollY"
                top = max(tab.read(find) if shot.top else 0, 0)
                yield shot.name, small(tab.picture(top, min(shot.height or whole, whole - top)))


def small(png: bytes) -> bytes:
    """A PNG of at most 256 colours, which these pages hardly exceed."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    if buffer.tell() > MOST:
        raise UserError(f"a picture has {buffer.tell()} bytes, wanted at most {MOST}; show less of its page")
    return buffer.getvalue()


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.pages.screenshots", __doc__)
    printed = read_file(settings.printed).decode(errors="replace").strip()
    text = load_folder(settings.run / "student").text_encoder.length
    whole = {
        "report": report(settings.run, text),
        "benchmarks": site.page(),
        "train": document.page("make train", document.terminal(printed)),
    }
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / f"{name}.html" for name in whole}
        for name, file in files.items():
            file.write_text(whole[name], encoding="utf-8")
        settings.out.mkdir(parents=True, exist_ok=True)
        for name, png in pictures(files):
            write_atomic(settings.out / f"{name}.png", png)
            print(f"{settings.out / name}.png  {len(png):,} bytes")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
