"""Rasterise the drawings of the emoji world from the published packages.

    npm pack @iconify-json/noto ... and unpack each into FOLDER/<set>
    python -m bilevel_fast.worlds.emoji.make_atlas --packages FOLDER --out FOLDER

needs `resvg_py` (the extra `atlas`). Writes a sheet per studio, and ATTRIBUTION.md with what the packages say of
their authors and licences. A set whose licence is share-alike, or unknown here, is refused.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError, require
from bilevel_fast.base.files import read_json, write_atomic
from bilevel_fast.worlds.emoji.drawings import CELL, COLUMNS, NAMES

SETS = {
    "fluent": "fluent-emoji-flat",
    "noto": "noto",
    "twemoji": "twemoji",
    "emojione": "emojione",
    "contrast": "fluent-emoji-high-contrast",
}
"""The package of each studio."""
_FREE = ("MIT", "Apache-2.0", "CC-BY-4.0")
_FINE = 4  # drawn at so many times the size of a cell, then averaged


@dataclass(frozen=True)
class AtlasConfig:
    """Rasterise the drawings of the emoji world."""

    packages: Path
    """Holds a folder per set, named as the set, with icons.json, info.json and package.json."""
    out: Path
    """Where the sheets go."""


def svg(icons: dict[str, Any], name: str) -> str:
    """One drawing as an SVG document, black where it leaves the colour open."""
    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    box = [icon.get(key, icons.get(key, default)) for key, default in _BOX]
    body = icon["body"].replace("currentColor", "black")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{" ".join(map(str, box))}" width="{CELL}" height="{CELL}">{body}</svg>'
    )


_BOX = (("left", 0), ("top", 0), ("width", 16), ("height", 16))


def sheet(icons: dict[str, Any]) -> bytes:
    """All drawings of a set as one PNG."""
    from PIL import Image

    resvg_py = require("resvg_py", "atlas")
    out = Image.new("RGBA", (COLUMNS * CELL, -(-len(NAMES) // COLUMNS) * CELL))
    for i, name in enumerate(NAMES):
        png = resvg_py.svg_to_bytes(svg_string=svg(icons, name), width=_FINE * CELL, height=_FINE * CELL)
        with Image.open(io.BytesIO(bytes(png))) as drawn:
            cell = drawn.convert("RGBA").reduce(_FINE)
        out.paste(cell, (i % COLUMNS * CELL, i // COLUMNS * CELL))
    packed = io.BytesIO()
    out.save(packed, "PNG", optimize=True)
    return packed.getvalue()


def attribution(studio: str, info: dict[str, Any], version: str) -> str:
    """A line of ATTRIBUTION.md."""
    licence, author = info["license"], info["author"]
    if licence["spdx"] not in _FREE:
        raise UserError(f"{studio}: licence {licence['spdx']}; wanted one of {', '.join(_FREE)}")
    return (
        f"| `{studio}.png` | {info['name']} | {author['name']}, {author.get('url', '')} | "
        f"[{licence['spdx']}]({licence['url']}) | @iconify-json/{SETS[studio]} {version} |"
    )


def main() -> None:
    config = flags.parse(AtlasConfig, "bilevel_fast.worlds.emoji.make_atlas", __doc__)
    config.out.mkdir(parents=True, exist_ok=True)
    lines = [_HEAD]
    for studio, name in SETS.items():
        folder = config.packages / name
        if not (folder / "icons.json").is_file():
            raise UserError(f"--packages {config.packages} has no {name}/icons.json")
        icons, info, package = (read_json(folder / f"{f}.json") for f in ("icons", "info", "package"))
        lines.append(attribution(studio, info, package["version"]))
        write_atomic(config.out / f"{studio}.png", sheet(icons))
    write_atomic(config.out / "ATTRIBUTION.md", "\n".join(lines).encode() + b"\n")


_HEAD = f"""# Whose drawings these are

Each sheet holds {len(NAMES)} drawings of a published emoji set, rasterised at {CELL}x{CELL} pixels and otherwise
unchanged.

| sheet | set | authors | licence | package |
|---|---|---|---|---|"""

if __name__ == "__main__":
    raise SystemExit(errors.run(main))
