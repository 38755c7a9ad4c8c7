"""The command that repeats a run, from the settings that its folder holds.

It names what differs from the defaults, and another folder than the run's, which is taken. It is one line, for a shell
in the folder where the run was started. A setting that this release does not know is left out.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel_fast.runs.config import PRESETS, preset
from bilevel_fast.training.run_folder import flatten

_OWN = ("preset", "out", "resume", "dry_run")
"""Settings of the command, not of what it makes."""


def command(config: Mapping[str, Any]) -> str:
    """`python -m bilevel_fast.train ...`.

    Args:
        config: What `config.json` of a training run holds.
    """
    words = ["python", "-m", "bilevel_fast.train", "--preset", preset_of(config), *flags(changed(config))]
    return shlex.join([*words, "--out", beside(config.get("out", "runs/run"))])


def changed(config: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from the preset's, by dotted name: the run's, and the preset's."""
    return different(config, preset(preset_of(config)).to_dict())


def preset_of(config: Mapping[str, Any]) -> str:
    """The preset that a run had, if there still is one of that name."""
    return config["preset"] if config.get("preset") in PRESETS else "mini"


def beside(out: Any) -> str:
    """Another folder than the run's."""
    path = Path(str(out))
    return str(path.with_name(f"{path.name}-again"))


def different(found: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that both have and that are not the same, by dotted name: the found one, and the known one."""
    before, now = (flatten(json.loads(json.dumps(some, default=str))) for some in (known, found))
    return {
        key: (value, before[key])
        for key, value in now.items()
        if key in before and key not in _OWN and value != before[key]
    }


def flags(changes: Mapping[str, tuple[Any, Any]], prefix: str = "") -> list[str]:
    """Words of a command line that set what `different` has found."""
    words: list[str] = []
    for key, (value, _) in changes.items():
        section, dot, name = f"{prefix}{key}".replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            words.append(f"--{section}{dot}{'' if value else 'no-'}{name}")
        else:
            words += [f"--{section}{dot}{name}", *map(str, value if isinstance(value, list) else [value])]
    return words
