"""The command that repeats a run, from its `config.json`."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel_fast.runs.config import PRESETS, preset
from bilevel_fast.training.run_folder import flatten

_OWN = ("preset", "out", "resume", "dry_run")
"""Settings of the command, not of what it makes."""


def command(config: Mapping[str, Any]) -> str:
    """`python -m bilevel_fast.train ...` in one line, for a shell in the folder where the run was started.

    It names what differs from the preset, and another folder than the run's, which is taken. A setting that this
    release does not know is left out.

    Args:
        config: What `config.json` holds.
    """
    words = ["python", "-m", "bilevel_fast.train", "--preset", _preset(config)]
    for key, (value, _) in changed(config).items():
        words += _flag(key, value)
    out = Path(str(config.get("out", "runs/run")))
    return shlex.join([*words, "--out", str(out.with_name(f"{out.name}-again"))])


def changed(config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from the preset's, by dotted name: the run's, and the preset's."""
    known, found = flatten(preset(_preset(config)).to_dict()), flatten(config)
    return {
        key: (value, known[key])
        for key, value in found.items()
        if key in known and key not in _OWN and value != known[key]
    }


def _preset(config: Mapping[str, Any]) -> str:
    return config["preset"] if config.get("preset") in PRESETS else "mini"


def _flag(key: str, value: Any) -> list[str]:
    section, dot, name = key.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return [f"--{section}{dot}{'' if value else 'no-'}{name}"]
    return [f"--{section}{dot}{name}", *map(str, value if isinstance(value, list) else [value])]
