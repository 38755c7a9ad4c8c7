"""The product at real size: every command on Stable Diffusion 2.1 with random weights, each within limits of time and
memory, and the speed and memory that come of it.

    make real-size                                                under 40 minutes on two cores, 20 GiB, 27 GB of disk
    python -m benchmarks.real_size --only train                   run stages anew, by name; --list names them
    python -m benchmarks.real_size --tiny --out /tmp/tiny         rehearse the rehearsal

Killed, the same command goes on. A stage that fails holds up nothing but what needs it. Exits with 1 if one failed or
exceeded its limit. Rows are appended to --rows as stages are done, those of --tiny are not.
"""

import json
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import RESULTS
from benchmarks.machine import describe
from benchmarks.real_size import table
from benchmarks.real_size.run import Done, line, rehearse, rows_of
from benchmarks.real_size.stages import REAL, TINY, stages
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError, nearest


@dataclass(frozen=True)
class Settings:
    """Settings of the rehearsal."""

    out: Path = Path("runs/real-size")
    """Where everything goes; nothing there is removed at the end."""
    only: tuple[str, ...] = ()
    """Run these stages anew, and no others."""
    rows: Path = RESULTS / "real_size.jsonl"
    """File to append rows to."""
    tiny: bool = False
    """A small model, to see that all commands are right."""
    list: bool = False
    """Print the stages with their commands and limits, and stop."""


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.real_size", __doc__)
    scale = TINY if settings.tiny else REAL
    every = stages(scale)
    names = [stage.name for stage in every]
    for name in settings.only:
        if name not in names:
            raise UserError(f"--only {name}: there is no such stage{nearest(name, names)}")
    if settings.list:
        for stage in every:
            print(f"{stage.name:<20}{stage.seconds:5.0f} s {stage.gib:4.0f} GiB  python -m {' '.join(stage.command)}")
        return
    settings.out.mkdir(parents=True, exist_ok=True)
    has = shutil.disk_usage(settings.out).free
    has += sum(file.stat().st_size for file in settings.out.rglob("*") if file.is_file())
    if has < scale.disk and not settings.only:
        wanted = f"wanted {scale.disk / 1e9:.0f}: choose another --out"
        raise UserError(f"{settings.out} has {has / 1e9:.0f} GB of disk, {wanted}")
    machine, rows = describe(torch.device("cpu")), list[dict[str, Any]]()

    def say(done: Done) -> None:
        print(line(done), flush=True)
        new = rows_of(done, settings.out, machine)
        rows.extend(new)
        if not settings.tiny and not done.kept:
            with settings.rows.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in new)

    found = rehearse(every, scale, settings.out, settings.only, say, machine=machine)
    print("\n" + table.page(rows))
    if failed := [done.name for done in found if done.why]:
        raise SystemExit(f"{len(failed)} of {len(found)} stages failed: {', '.join(failed)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process of the stage does not outlive us
    raise SystemExit(errors.run(main))
