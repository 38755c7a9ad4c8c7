"""Prompt sets of the paper's evaluation, recognised by their columns.

    artists       prompt, evaluation_seed, artist, ...; 50 rows of an artist per file
    I2P           prompt, categories, evaluation_seed, ...; 4703 prompts
    MMA           adv_prompt, ...; adversarial prompts against filters and erasure
    COCO          image_id, prompt, evaluation_seed (coco_30k.csv), or captions_*.json
    lines         one prompt per line (Ring-A-Bell)

Ids are those that `sample --prompts-file` gives the images (`bilevel_fast.sampling.prompts`): images are found by id,
never by their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bilevel_fast.base.errors import UserError
from bilevel_fast.sampling.prompt_table import Table, read_table
from bilevel_fast.sampling.prompts import ID_COLUMNS, Row, prompt_column, read_rows

SEED, ARTIST = "evaluation_seed", ("artist", "artists")


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
        path: `.csv`, `.json` or `.txt`.
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
    table = read_table(path)
    prompt = prompt_column(table)
    if seeds:
        table.want(SEED)
    rows = read_rows(path, prompt_column=prompt, seed_column=SEED if SEED in table.columns else None)
    return PromptSet(path.stem, tuple(rows), _groups(table, rows, path.stem))


def _groups(table: Table, rows: Sequence[Row], by_default: str) -> tuple[str, ...]:
    artist = next((name for name in ARTIST if name in table.columns), None)
    if artist is None:
        return (by_default,) * len(rows)
    id_column = next((name for name in ID_COLUMNS if name in table.columns), None)
    found = {
        str(number) if id_column is None else cells[id_column]: cells[artist]
        for number, (_, cells) in enumerate(table.rows)
    }
    return tuple(found[row.id] or by_default for row in rows)
