"""Prompt sets of the paper's evaluation, recognised by their columns.

    artists       prompt, evaluation_seed, artist, ...; 50 rows of an artist per file
    I2P           prompt, categories, evaluation_seed, ...; 4703 prompts
    MMA           adv_prompt, ...; adversarial prompts against filters and erasure
    COCO          image_id, prompt, evaluation_seed (coco_30k.csv), or captions_*.json
    lines         one prompt per line (Ring-A-Bell)

Ids are those that `sample --prompts-file` gives the images (`bilevel_fast.sampling.prompts`): images are found by id,
never by their order.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.sampling.prompts import ID_COLUMNS, Row, read_rows

SEED, ADVERSARIAL, ARTIST = "evaluation_seed", "adv_prompt", ("artist", "artists")


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one file, and what group each belongs to."""

    name: str
    """The file's, without its suffix."""
    rows: tuple[Row, ...]
    groups: tuple[str, ...]
    """The artist of each prompt; the name of the file where it names none."""

    @property
    def ids(self) -> list[str]:
        return [row.id for row in self.rows]

    @property
    def texts(self) -> list[str]:
        return [row.prompt for row in self.rows]


def read_prompt_set(path: Path | str, *, seeds: bool = False) -> PromptSet:
    """Read a prompt set of any of the kinds above.

    Args:
        path: `.csv`, `.json`, else lines.
        seeds: The file must have an `evaluation_seed` for every prompt; otherwise they are read where they are.

    Raises:
        UserError: The file is missing or malformed, lacks a column, or has no seeds where they were asked for.
    """
    path = Path(path)
    if path.suffix.lower() != ".csv":
        if seeds:
            raise UserError(f"prompt file {path} has no column {SEED!r}: only a .csv has columns")
        rows = read_rows(path)
        return PromptSet(path.stem, tuple(rows), (path.stem,) * len(rows))
    columns = _columns(path)
    prompt = next((name for name in ("prompt", ADVERSARIAL) if name in columns), None)
    if prompt is None:
        raise UserError(f"prompt file {path} has no column 'prompt' or {ADVERSARIAL!r}{nearest('prompt', columns)}")
    if seeds and SEED not in columns:
        raise UserError(f"prompt file {path} has no column {SEED!r}{nearest(SEED, columns)}")
    rows = read_rows(path, prompt_column=prompt, seed_column=SEED if SEED in columns else None)
    return PromptSet(path.stem, tuple(rows), _groups(path, columns, rows))


def _columns(path: Path) -> list[str]:
    """Names of the columns; [] for a missing or empty file, of which `read_rows` says more."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [name.strip() for name in next(csv.reader(file), [])]
    except FileNotFoundError as error:
        raise UserError(f"prompt file {path} does not exist") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"prompt file {path} is no table in UTF-8: {error}") from error


def _groups(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> tuple[str, ...]:
    artist = next((name for name in ARTIST if name in columns), None)
    if artist is None:
        return (path.stem,) * len(rows)
    id_column = next((name for name in ID_COLUMNS if name in columns), None)
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, fieldnames=list(columns))
        next(table)  # the header
        found: dict[str, str] = {}
        for number, fields in enumerate(table):
            name = str(number) if id_column is None else (fields[id_column] or "").strip()
            found[name] = (fields[artist] or "").strip()
    return tuple(found[row.id] or path.stem for row in rows)
