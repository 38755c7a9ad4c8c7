"""The command that carries an experiment out again."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bilevel_fast.runs import repeat
from bilevel_fast.runs.config import preset
from bilevel_fast.runs.paper.experiments import ERASE, EXPERIMENTS
from bilevel_fast.runs.paper.settings import MINI, Full, Rows


def reproduction(name: str, asked: Mapping[str, Any], seeds: Sequence[int], out: Path) -> str:
    """`python -m bilevel_fast.reproduce NAME ...`.

    Args:
        name: Of the experiment.
        asked: What `config.json` of its folder holds: `run`, `rows` and perhaps `full`.
        seeds: Of its rows.
        out: Its folder.
    """
    run, full = asked["run"], asked.get("full")
    world = run.get("world", "mini")
    usual = world if full is None else "paper"
    erase = ERASE.get(world, ())[: EXPERIMENTS[name].concepts]
    known: dict[str, Any] = {
        "run": replace(preset(repeat.preset_of(run)), seed=run["seed"], world=world, erase=erase).to_dict(),
        "rows": asdict(MINI if full is None else Rows()),
        "full": asdict(Full()),
    }
    words = ["python", "-m", "bilevel_fast.reproduce", name]
    words += [] if full is None else ["--scale", "full"]
    words += [] if world == "mini" else ["--world", world]
    words += [] if repeat.preset_of(run) == usual else ["--run.preset", repeat.preset_of(run)]
    for section, found in asked.items():
        words += repeat.flags(repeat.different(found, known[section]), f"{section}.")
    return shlex.join([*words, "--seeds", *map(str, seeds), "--out", repeat.beside(out)])
