"""Prompt files, for every command that reads one: rows of an id, a prompt and perhaps a seed.

    csv     .csv    a table with a header: a column `prompt`, and one of ids; without ids, rows are numbered from 0
    lines   .txt    one prompt per line; the id is its number, from 0
    coco    .json   `captions_*.json`: `annotations` of `image_id` and `caption`; the id is that of the image

COCO has five captions to an image. The released evaluation samples them all, one over the other, so that the last one
of each image is what it measures; it is the default here, and the only one that is drawn.
"""

import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.files import read_json
from bilevel_fast.sampling.prompt_table import Table, read_table, read_text

Layout = Literal["auto", "csv", "lines", "coco"]
Duplicates = Literal["refuse", "first", "last", "all"]

ID_COLUMNS = ("case_number", "id", "image_id")
PROMPT_COLUMNS = ("prompt", "adv_prompt")
_SUFFIXES: dict[str, Layout] = {".csv": "csv", ".json": "coco", ".txt": "lines", "": "lines"}

_log = logging.getLogger(__name__)
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class Row:
    """One image to be drawn."""

    id: str
    """Names its file: letters, digits, `.`, `_` and `-`."""
    prompt: str
    seed: int | None = None
    """Of its noise; None is the seed of the whole set."""

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise UserError(f"id {self.id!r} cannot name a file; wanted letters, digits, '.', '_' and '-', 200 at most")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}; it must be in [0, 2**64)")


@dataclass(frozen=True)
class RowFlags:
    """How a prompt file is read: flags of commands, arguments of `read_rows`."""

    layout: Layout = "auto"
    """Of the prompt file; auto goes by its name: .csv, .json (COCO's captions) or .txt, a prompt per line."""
    prompt_column: str = "prompt"
    """Of a table: prompt, adv_prompt, ..."""
    id_column: str | None = None
    """Of a table: names the images. Default: case_number, id or image_id, else rows are numbered from 0."""
    seed_column: str | None = None
    """Of a table: a seed for each prompt, such as evaluation_seed. Default: one seed for all."""
    duplicates: Duplicates | None = None
    """Which rows of an id to keep. Default: the last of COCO's captions of an image; others are refused."""
    limit: int | None = None
    """Only the first so many ids."""

    def read(self, path: Path) -> list[Row]:
        """As `read_rows`."""
        return read_rows(path, **{field.name: getattr(self, field.name) for field in fields(RowFlags)})


def read_rows(
    path: Path | str,
    *,
    layout: Layout = "auto",
    prompt_column: str = "prompt",
    id_column: str | None = None,
    seed_column: str | None = None,
    duplicates: Duplicates | None = None,
    limit: int | None = None,
) -> list[Row]:
    """Read a prompt set. Rows without a prompt are left out, and a warning says which.

    Args:
        path: The file, UTF-8.
        layout: `auto` goes by its name, as above; a name that ends otherwise is refused.
        prompt_column: Of a table, such as `adv_prompt`.
        id_column: Of a table; by default the first of `ID_COLUMNS` that it has, else rows are numbered.
        seed_column: Of a table, such as `evaluation_seed`; by default rows have no seed of their own.
        duplicates: What to do about an id that is there twice: refuse it, keep the `first` or the `last` row, or keep
            `all` as `ID-0`, `ID-1`, ... By default COCO's captions keep the last, all else is refused.
        limit: Keep the first so many ids only.

    Raises:
        UserError: The file is missing, not UTF-8, not of that layout or of none, lacks a column, or holds no prompt; a
            row has a bad id or seed, the id of another, or more or fewer cells than the header. The line is named.
    """
    path = Path(path)
    if layout not in (known := get_args(Layout)):
        raise UserError(f"prompt layout {layout!r} does not exist{nearest(layout, known)}")
    layout = _layout(path) if layout == "auto" else layout
    if layout != "csv" and (prompt_column != "prompt" or id_column is not None or seed_column is not None):
        raise UserError(f"prompt file {path} is read as {layout}, which has no columns; only a table, csv, has them")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; wanted at least 1")
    match layout:
        case "csv":
            rows = _rows(path, prompt_column, id_column, seed_column)
        case "coco":
            rows = _captions(path)
        case _:
            rows = ((f"line {n + 1}", Row(str(n), line)) for n, line in enumerate(_read_lines(path)))
    kept = _without_duplicates(path, rows, duplicates or ("last" if layout == "coco" else "refuse"), limit)
    if not kept:
        raise UserError(f"prompt file {path} holds no prompt")
    return kept


def read_prompts(path: Path | str) -> list[str]:
    """All prompts of a file in its order, by its name as `read_rows` has it: of an image, all captions.

    Rows without a prompt are left out, and a warning says which.

    Raises:
        UserError: The file is missing, not UTF-8, not of the layout that its name says or of none, lacks the column,
            or holds no prompt.
    """
    path = Path(path)
    match _layout(path):
        case "csv":
            table = read_table(path)
            column = prompt_column(table)
            _say_empty(path, "lines", [line for line, cells in table.rows if not cells[column]])
            prompts = [cells[column] for _, cells in table.rows if cells[column]]
        case "coco":
            prompts = [row.prompt for _, row in _captions(path)]
        case _:
            prompts = _read_lines(path)
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt")
    return prompts


def prompt_column(table: Table) -> str:
    """The column of a table that holds its prompts: the first of `PROMPT_COLUMNS` that it has.

    Raises:
        UserError: It has none of them.
    """
    for name in PROMPT_COLUMNS:
        if name in table.columns:
            table.want(name)
            return name
    wanted = " or ".join(map(repr, PROMPT_COLUMNS))
    raise UserError(f"{table.name} has no column {wanted}{nearest('prompt', table.columns)}")


def _read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file that are not empty, stripped.

    Raises:
        UserError: The file is missing or not UTF-8.
    """
    return [line.strip() for line in read_text(path).split("\n") if line.strip()]


def same_text(text: str) -> str:
    """What two texts share if they are the same but for case and spacing."""
    return " ".join(text.casefold().split())


def _layout(path: Path) -> Layout:
    """What the name of a file says it is."""
    try:
        return _SUFFIXES[path.suffix.lower()]
    except KeyError:
        raise UserError(
            f"prompt file {path} ends in {path.suffix!r}; wanted .csv (a table with a header), .json (COCO's captions) "
            "or .txt (a prompt per line)"
        ) from None


def _rows(path: Path, prompt: str, ids: str | None, seeds: str | None) -> Iterator[tuple[str, Row]]:
    """Where each row of a CSV table stands, and the row."""
    table = read_table(path)
    ids = ids or next((name for name in ID_COLUMNS if name in table.columns), None)
    table.want(*(name for name in (prompt, ids, seeds) if name is not None))
    _say_empty(path, "lines", [line for line, cells in table.rows if not cells[prompt]])
    for number, (line, cells) in enumerate(table.rows):
        if not cells[prompt]:
            continue
        try:
            name = str(number) if ids is None else cells[ids]
            row = Row(name, cells[prompt], None if seeds is None else _seed(cells[seeds]))
        except UserError as error:
            raise UserError(f"prompt file {path}, line {line}: {error}") from error
        yield f"line {line}", row


def _seed(text: str) -> int:
    digits = text.removesuffix(".0")  # tables that went through a data frame with gaps have floats
    try:
        return int(digits)
    except ValueError as error:
        raise UserError(f"seed {text!r} is no integer") from error


def _captions(path: Path) -> Iterator[tuple[str, Row]]:
    annotations = read_json(path).get("annotations")
    if not isinstance(annotations, list):
        raise UserError(f"{path}: wanted COCO captions, a list of 'annotations'")
    empty: list[int] = []
    for number, annotation in enumerate(annotations):
        where = f"annotation {number}"
        match annotation:
            case {"image_id": int(image) | str(image), "caption": str(caption)}:
                if not caption.strip():
                    empty.append(number)
                    continue
            case _:
                raise UserError(f"{path}, {where}: wanted 'image_id' and 'caption'")
        try:
            yield where, Row(str(image), caption.strip())
        except UserError as error:
            raise UserError(f"{path}, {where}: {error}") from error
    _say_empty(path, "annotations", empty)


def _say_empty(path: Path, what: str, numbers: Sequence[int]) -> None:
    if numbers:
        shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        _log.warning("prompt file %s: %s %s have no prompt and are left out", path, what, shown)


def _without_duplicates(
    path: Path, rows: Iterator[tuple[str, Row]], duplicates: Duplicates, limit: int | None
) -> list[Row]:
    if duplicates not in (known := get_args(Duplicates)):
        raise UserError(f"duplicates {duplicates!r} does not exist{nearest(duplicates, known)}")
    groups: dict[str, list[tuple[str, Row]]] = {}
    for where, row in rows:
        group = groups.setdefault(row.id, [])
        if group and duplicates == "refuse":
            raise UserError(
                f"prompt file {path}: id {row.id!r} is there twice, {group[0][0]} and {where}; "
                "wanted another id column, or which of them to keep"
            )
        group.append((where, row))
    kept: list[Row] = []
    for group in itertools.islice(groups.values(), limit):
        if duplicates == "all":
            kept += [replace(row, id=f"{row.id}-{n}") for n, (_, row) in enumerate(group)]
        else:
            kept.append(group[0 if duplicates == "first" else -1][1])
    return kept
