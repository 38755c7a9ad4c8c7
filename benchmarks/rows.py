"""Rows of benchmarks: JSON objects, one a line, with a suite; a measured one has case, provider, metric, value, device.

from benchmarks import rows
rows.read(Path("benchmarks/results/baseline.jsonl"))
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import append

Row = dict[str, Any]
NO_SETTINGS = ("error", "bound", "prepare_s", "ops")
"""What benchmarks.speed.unet found out while it set up: in a row's config, but no part of its key."""


def read(path: Path) -> list[Row]:
    """The rows of a file, those without a metric included.

    Raises:
        UserError: The file is missing, or a line is no row; names file and line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of rows")
    return [parse(line, f"{path}:{n}") for n, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]


def append_rows(path: Path, found: Iterable[Row]) -> None:
    """Add rows to a file as `base.files.append` does: a kill leaves all of them or none, a full disk is named."""
    append(path, "".join(json.dumps(row) + "\n" for row in found).encode())


def parse(line: str, where: str) -> Row:
    """One row from a line of JSON.

    Raises:
        UserError: It is no row; starts with `where`.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict) or not isinstance(row.get("suite"), str):
        raise UserError(f"{where}: wanted a JSON object with a suite")
    if "metric" in row:
        for field in ("case", "provider", "device"):
            if not isinstance(row.get(field), str):
                raise UserError(f"{where}: field {field!r} is {row.get(field)!r}, wanted a string")
        if "value" not in row:
            raise UserError(f"{where}: a metric, but no value; null says that it was not measured")
        for field in ("value", "p20", "p80"):
            number = row.get(field)
            good = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
            if number is not None and not good:
                raise UserError(f"{where}: field {field!r} is {number!r}, wanted a finite number or null")
    return row


def key(row: Row) -> tuple[str, ...]:
    """What two rows must share to be compared, but for the device."""
    names = ("suite", "op", "case", "provider", "metric", "dtype")
    config = row.get("config")
    if isinstance(config, dict):
        config = {name: value for name, value in config.items() if name not in NO_SETTINGS}
    return (*(str(row.get(name)) for name in names), json.dumps(config, sort_keys=True))


def device(row: Row) -> str:
    """Where the row was measured. Threads count on a CPU only, and where the row names them."""
    threads = None if row.get("driver") else row.get("threads")
    return row["device"] if threads is None else f"{row['device']}, {threads} thread{'s' * (threads != 1)}"


def is_projection(row: Row) -> bool:
    """A number of a model, not of a machine."""
    return row["suite"] == "roofline" or bool(row.get("projection"))


def latest(rows: Iterable[Row]) -> dict[tuple[str, ...], Row]:
    """The last row of each key and device, of the rows that have a metric."""
    return {(*key(row), device(row)): row for row in rows if "metric" in row}


def config_text(row: Row) -> str:
    """The plain values of a row's config; nested ones, such as a whole UNet, are left out."""
    config = row.get("config")
    plain = config.items() if isinstance(config, dict) else ()
    return " ".join(f"{name}={value}" for name, value in plain if not isinstance(value, dict | list))


def number(value: float | None) -> str:
    """A value for a table: whole numbers in full, others to five digits."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}" if abs(value) < 1e5 else f"{value:,.0f}"
