"""Keep what `bilevel_fast.reproduce` has measured, and show it in docs/results.md and docs/emoji.md.

    python -m bilevel_fast.reproduce table1                  measures
    python -m benchmarks.pages.reproduced runs/reproduce-mini      keeps results, plots and grids of all its experiments

A kept experiment lies in benchmarks/results/reproduce/NAME/, of the emoji world in reproduce-emoji/NAME/, with the
commit and the day on which it was kept.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks import RESULTS
from benchmarks.machine import describe
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json, write_json
from bilevel_fast.runs.paper.experiments import EXPERIMENTS
from bilevel_fast.runs.paper.judges import Column
from bilevel_fast.runs.paper.report import table

PICTURES = ("plot.png", "grid.png")
SAME_GRID = ("table2", "table3", "fig7")
"""Experiments on the models of table 1: its grid is theirs."""


def place_of(world: str, results: Path = RESULTS) -> Path:
    """Where experiments on a built-in world are kept."""
    return results / ("reproduce" if world == "mini" else f"reproduce-{world}")


@dataclass(frozen=True)
class Settings:
    """What to keep."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The --out of bilevel_fast.reproduce."""


def keep(folder: Path, into: Path) -> list[str]:
    """Copy the results of every experiment in a folder; returns their names.

    Raises:
        UserError: There is none.
    """
    names = [name for name in EXPERIMENTS if (folder / name / "results.json").exists()]
    if not names:
        raise UserError(f"{folder} holds no results; run: python -m bilevel_fast.reproduce table1 --out {folder}")
    here = describe(torch.device("cpu"))
    for name in names:
        found = read_json(folder / name / "results.json")
        place = into / name
        place.mkdir(parents=True, exist_ok=True)
        if (place / "results.json").exists() and read_json(place / "results.json")["rows"] == found["rows"]:
            continue  # the commit and the day stay those of the measurement
        write_json(place / "results.json", {**found, "commit": here["commit"], "date": here["date"]})
        for picture in PICTURES:
            if (folder / name / picture).exists() and not (picture == "grid.png" and name in SAME_GRID):
                shutil.copyfile(folder / name / picture, place / picture)
    return names


def markdown(name: str, kept: Path) -> str:
    """The table of a kept experiment, and where it was measured."""
    path = kept / name / "results.json"
    if not path.exists():
        return "not measured"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rows, columns = found["rows"], [Column(**column) for column in found["columns"]]
    where = sorted(
        {f"{r['device']}, {r['threads']} thread{'s' * (r['threads'] != 1)}, torch {r['torch']}" for r in rows}
    )
    measured = f"Measured on {'; '.join(where)}; kept at commit {found['commit']}, {found['date']}."
    return f"{table(EXPERIMENTS[name], columns, rows)}\n\n{measured}"


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.pages.reproduced", __doc__)
    config = read_json(settings.folder / "config.json")
    names = keep(settings.folder, place_of(config["run"].get("world", "mini")))
    print(f"kept: {', '.join(names)}; now python -m benchmarks.pages.readme")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
