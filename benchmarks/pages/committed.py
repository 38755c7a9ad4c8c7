"""The committed rows, and what every generated table does with them."""

import json
from collections.abc import Iterable
from typing import Any

from benchmarks import RESULTS as RESULTS

Row = dict[str, Any]
NOT_MEASURED = "not measured"


def load(name: str) -> list[Row]:
    """The rows of a committed file; none if there is no such file."""
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def within(row: Row, digits: int = 2, factor: float = 1.0) -> str:
    """A value with its 20 and 80 % quantiles, each times a factor: `2.00 (1.91..2.12)`."""
    value, low, high = (f"{factor * row[key]:.{digits}f}" for key in ("value", "p20", "p80"))
    return f"{value} ({low}..{high})"


def machines(rows: Iterable[Row]) -> str:
    """Where rows were measured, in a sentence."""
    found = {
        f"{r['device']}, {r['threads']} thread{'s' * (r['threads'] != 1)}, torch {r['torch']}, commit {r['commit']}, "
        f"{r['date']}"
        for r in rows
    }
    return f"Measured on {'; '.join(sorted(found))}."
