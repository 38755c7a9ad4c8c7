"""What `python -m bilevel_fast.reproduce` is told."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from bilevel_fast.base import flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.runs.config import TrainConfig, preset
from bilevel_fast.runs.paper.experiments import ERASE, EXPERIMENTS
from bilevel_fast.runs.paper.settings import MINI, UNREAD, Full, Rows


@dataclass(frozen=True)
class Args:
    """What to reproduce, and how."""

    MAIN: ClassVar = (
        *("scale", "world", "out", "seeds", "run.teacher", "run.data", "run.concepts", "run.erase", "run.device"),
        *("run.lower.steps", "run.upper.every", "run.prune.budget"),
        *("full.phrase", "full.subjects", "full.styles", "full.coco", "full.coco_images"),
        *("full.clip_weights", "full.csd_weights", "full.inception_weights"),
    )

    experiment: Annotated[Literal["table1", "table2", "table3", "fig4", "fig5", "fig6", "fig7"], tyro.conf.Positional]
    """Which table or figure."""
    scale: Literal["mini", "full"] = "mini"
    """`mini` runs on a built-in world in minutes; `full` wants Stable Diffusion 2.1 and its data by path."""
    world: Literal["mini", "emoji"] = "mini"
    """The built-in world of --scale mini; the run begins with the preset of its name."""
    out: Path | None = None
    """Folder for all experiments of the same settings; they share models. Default: runs/reproduce-SCALE, and
    runs/reproduce-emoji on that world."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of everything each."""
    run: TrainConfig = field(default_factory=lambda: preset("mini"))
    """The bilevel run; the other rows share with it what they can. --scale full begins with the preset `paper`."""
    rows: Rows = field(default_factory=Rows)
    full: Full = field(default_factory=Full)


def read(argv: Sequence[str], about: str | None) -> Args:
    """Read the command line; flags change the fields of the scale's preset. `about` is the head of the help.

    Raises:
        UserError: The settings contradict each other, or the experiment.
    """
    full, world = flags.value(argv, "--scale") == "full", flags.value(argv, "--world") or "mini"
    world = world if world in ERASE else "mini"  # the parser refuses another
    name = flags.value(argv, "--run.preset") or ("paper" if full else world)
    asked = next((EXPERIMENTS[arg] for arg in argv if arg in EXPERIMENTS), None)
    erase = ERASE[world][: asked.concepts] if asked else preset(name).erase
    run = replace(preset(name), preset=name, world=world, erase=erase)
    default = Args(tyro.MISSING, run=run, rows=Rows() if full else MINI)
    args = flags.parse(Args, "bilevel_fast.reproduce", about, args=argv, default=default)
    if full and not (args.run.teacher and args.run.data and args.run.concepts):
        raise UserError("--scale full wants --run.teacher, --run.data and --run.concepts")
    if full and args.world != "mini":
        raise UserError(f"--world {args.world} is given with --scale full, and would not be read")
    if not full and args.full != Full():
        raise UserError("--full.* is given without --scale full, and would not be read")
    for name, instead in UNREAD.items():
        if getattr(args.run, name) != getattr(default.run, name):
            raise UserError(f"--run.{name.replace('_', '-')} is not read here; {instead}")
    args.run.check()
    if not args.run.upper.every or not args.seeds:
        raise UserError("--run.upper.every and --seeds want at least one: there would be nothing to compare")
    wanted = EXPERIMENTS[args.experiment].concepts
    flag, named = ("--run.erase", args.run.erase) if args.scale == "mini" else ("--full.phrase", args.full.phrase)
    if len(named) < wanted:
        raise UserError(f"{args.experiment} erases {wanted} concepts; {flag} names {len(named)}")
    if EXPERIMENTS[args.experiment].apart and len(args.full.styles) not in (0, len(args.full.phrase)):
        raise UserError(
            f"{args.experiment} makes models for each of {len(args.full.phrase)} --full.phrase; --full.styles names "
            f"{len(args.full.styles)} prompt files, wanted one each"
        )
    return args
