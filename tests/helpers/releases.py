"""Numbers that a release of torch decides, such as how often it copies: rows of another one are no measure of them."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch


def release(version: str) -> str:
    """Its first two numbers."""
    return ".".join(version.split(".")[:2])


def of_this_torch(rows: Iterable[Mapping[str, Any]]) -> None:
    """Skip what follows in a test if rows are of other releases of torch than this one."""
    theirs = sorted({release(row["torch"]) for row in rows})
    if theirs != [release(torch.__version__)]:
        pytest.skip(f"the committed rows are of torch {', '.join(theirs)}, and this is {torch.__version__}")
