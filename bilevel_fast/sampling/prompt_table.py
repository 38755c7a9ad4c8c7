"""Tables of texts (CSV), as every command reads them: what does not fit is refused with its line, never guessed.

The first line names the columns. Cells and names lose the blanks around them. A row has as many cells as there are
columns: one more is a comma that wants quotes, and what stands behind it would be lost.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.files import read_file


@dataclass(frozen=True)
class Table:
    """A table that was read."""

    name: str
    """What messages call it: `prompt file PATH`."""
    columns: tuple[str, ...]
    rows: tuple[tuple[int, dict[str, str]], ...]
    """The line at which each begins, and its cells by column."""

    def want(self, *names: str) -> None:
        """Refuse a table without these columns.

        Raises:
            UserError: One is missing, or there twice.
        """
        for name in names:
            if (count := self.columns.count(name)) != 1:
                why = f"has {count} columns {name!r}" if count else f"has no column {name!r}"
                raise UserError(f"{self.name} {why}{'' if count else nearest(name, self.columns)}")


def read_table(path: Path, what: str = "prompt file") -> Table:
    """Read a CSV table.

    Raises:
        UserError: It is missing or not UTF-8; a row has more or fewer cells than there are columns; a quote is not
            closed, or closed in the middle of a cell. The line is named.
    """
    text = read_text(path, what)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    columns: tuple[str, ...] | None = None
    rows: list[tuple[int, dict[str, str]]] = []
    begin = 1
    try:
        for cells in reader:
            line, begin = begin, reader.line_num + 1
            if not cells:
                continue
            if columns is None:
                columns = tuple(cell.strip() for cell in cells)
                continue
            if len(cells) != len(columns):
                hint = "; a text that holds a comma wants quotes" if len(cells) > len(columns) else ""
                raise UserError(
                    f"{what} {path}, line {line}: found {len(cells)} cells, wanted {len(columns)} "
                    f"({', '.join(columns)}){hint}"
                )
            rows.append((line, {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}))
    except csv.Error as error:
        why = "a quote that opens here is never closed" if "unexpected end" in str(error) else error
        raise UserError(f"{what} {path}, line {begin}: {why}") from error
    return Table(f"{what} {path}", columns or (), tuple(rows))


def read_text(path: Path, what: str = "prompt file") -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        UserError: It is missing, no regular file, too large, or not UTF-8.
    """
    if not path.exists():
        raise UserError(f"{what} {path} does not exist")
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8: {error.reason} at byte {error.start}") from error
