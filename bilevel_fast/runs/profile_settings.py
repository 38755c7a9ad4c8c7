"""What `python -m bilevel_fast.profile` is told: the settings of a run, and how many of its steps are profiled."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from bilevel_fast.base import flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.runs.config import TrainConfig, preset

_BY_DATA = "mini, or paper with --data"


@dataclass(frozen=True)
class ProfileConfig(TrainConfig):
    """Settings of a run, and of its profile."""

    MAIN: ClassVar = ("steps", "warmup", "profile_out", "overwrite")
    GROUPS: ClassVar = {"profile": MAIN}

    preset: str = _BY_DATA
    """Where the defaults come from: mini, emoji, smoke, paper or released."""
    steps: int = 8
    """Lower steps to record; upper ones as many as training would take meanwhile, at least one."""
    warmup: int = 2
    """Steps of each level before anything is measured."""
    profile_out: Path = Path("runs/profile")
    """Folder of the results; must be new or empty, unless --overwrite."""
    overwrite: bool = False
    """Replace the results in --profile-out."""


def read(argv: Sequence[str], about: str | None) -> ProfileConfig:
    """Read the command line; as for `train`, the preset is `paper` if there is --data, otherwise that of --world.

    `about` is the head of the help.

    Raises:
        UserError: Names the flag.
    """
    read = partial(flags.parse, ProfileConfig, "bilevel_fast.profile", about, args=argv)
    given = read(default=_defaults("mini", preset=_BY_DATA))
    name = given.preset if given.preset != _BY_DATA else given.world if given.data is None else "paper"
    config = read(default=_defaults(name))
    config.check()
    from bilevel_fast.erasing import registry as upper  # after the flags are read: --help should not wait for torch

    upper.check(config.upper, preset(config.preset).upper)
    if config.scale.in_parts:
        raise UserError("--scale.parameters fsdp: a profile is of one process, which has all weights; wanted flat")
    if config.steps < 1 or config.warmup < 0:
        raise UserError(f"--steps {config.steps} --warmup {config.warmup}: wanted at least 1 and at least 0")
    return config


def _defaults(name: str, **changes: Any) -> ProfileConfig:
    return ProfileConfig(**{**vars(preset(name)), **changes})
