"""Where the time of a training step goes, room by room.

On the built-in mini world, with a GPU if there is one, or on a model of yours:

python -m bilevel_fast.profile
python -m bilevel_fast.profile --preset paper --teacher DIR --student DIR --data CACHE --concepts BANK

Profiles the steps that `bilevel_fast.train` would take with the same flags: prints time, share, launches, TFLOP/s and
GB/s of every room of the lower and the upper step, and the ops that take most of them. Leaves profile.json, trace.json
(for ui.perfetto.dev) and step.png in --profile-out. Keeps no student: --out and --resume have no effect.

The rooms are NVTX ranges, too:

nsys profile python -m bilevel_fast.profile ...
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from bilevel_fast.base import errors, flags
from bilevel_fast.base.alone import alone
from bilevel_fast.base.errors import UserError
from bilevel_fast.runs.config import TrainConfig, preset

_BY_DATA = "mini, or paper with --data"


@dataclass(frozen=True)
class ProfileConfig(TrainConfig):
    """Settings of a run, and of its profile."""

    MAIN: ClassVar = ("steps", "warmup", "profile_out", "overwrite")
    GROUPS: ClassVar = {"profile": MAIN}

    preset: str = _BY_DATA
    """Where the defaults come from: mini, smoke, paper or released."""
    steps: int = 8
    """Lower steps to record; upper ones as many as training would take meanwhile, at least one."""
    warmup: int = 2
    """Steps of each level before anything is measured."""
    profile_out: Path = Path("runs/profile")
    """Folder of the results; must be new or empty, unless --overwrite."""
    overwrite: bool = False
    """Replace the results in --profile-out."""


def settings() -> dict[str, Any]:
    """What its flags are read into, by the words before them."""
    return {"": ProfileConfig}


def parse(argv: Sequence[str]) -> ProfileConfig:
    """Read the command line; as for `train`, the preset is `paper` if there is --data, otherwise `mini`.

    Raises:
        UserError: Names the flag.
    """
    read = partial(flags.parse, ProfileConfig, "bilevel_fast.profile", __doc__, args=argv)
    given = read(default=_defaults("mini", preset=_BY_DATA))
    name = given.preset if given.preset != _BY_DATA else "mini" if given.data is None else "paper"
    config = read(default=_defaults(name))
    config.check()
    from bilevel_fast.erasing import registry as upper  # after the flags are read: --help should not wait for torch

    upper.check(config.upper, preset(config.preset).upper)
    if config.steps < 1 or config.warmup < 0:
        raise UserError(f"--steps {config.steps} --warmup {config.warmup}: wanted at least 1 and at least 0")
    return config


def _defaults(name: str, **changes: Any) -> ProfileConfig:
    return ProfileConfig(**{**vars(preset(name)), **changes})


def main() -> None:
    alone("bilevel_fast.profile")
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    config = parse(sys.argv[1:])
    if config.dry_run:
        print(json.dumps(config.to_dict(), indent=2))
        return
    # after parsing: --help and a typo should not wait for the engine
    from bilevel_fast.base.claims import locked, made
    from bilevel_fast.base.devices import machine, pick_device
    from bilevel_fast.base.files import scratch
    from bilevel_fast.profiling import picture
    from bilevel_fast.runs.profiled import profiled

    picture.check_free(config.profile_out, config.overwrite)
    device = pick_device(config.device)
    with (
        made(config.profile_out),
        scratch(config.profile_out) as folder,
        locked(config.profile_out / ".lock", f"--profile-out {config.profile_out}"),
    ):
        trace = folder / "trace.json"
        steps, graphs = profiled(config, device, config.steps, config.warmup, folder, trace)
        about = {**machine(device), "graphs": graphs, "config": config.to_dict()}
        picture.save(config.profile_out, steps, about, trace)
    print("\n\n".join(picture.tables(step, device.type == "cuda") for step in steps))
    if graphs:
        print("\nWithout the profiler, and in training, a step is one CUDA graph; it is profiled as single launches.")
    print(f"\n{config.profile_out / 'step.png'}   trace.json   profile.json")


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
