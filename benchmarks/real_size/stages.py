"""The stages: what a user would type in the rehearsal's folder, how much it may take, and what must come of it.

Limits are about twice what two cores of a server take for Stable Diffusion 2.1 at latents of 32 x 32; memory is what a
process holds (`measuring`), and no stage holds more than 20 GiB. All limits together are 40 minutes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_size import checks
from benchmarks.real_size.checks import HALF, STEPS, STUDENT

PHRASE = "in the style of monet"
TRAIN = (
    *("bilevel_fast.train", "--preset", "paper", "--teacher", "sd21", "--student", STUDENT),
    *("--data", "cache", "--concepts", "bank", "--out", "run", "--lower.steps", str(STEPS), "--upper.every", str(HALF)),
    *("--lower.batch", "1", "--upper.batch", "1", "--lower.warmup", "0", "--upper.warmup", "0"),
    *("--checkpoint-every", str(HALF), "--log-every", "1"),
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How large the rehearsal is.

    Attributes:
        name: Of the model, in rows.
        tiny: Whether the folder is the tiny one.
        resolution: Pixels of the pictures.
        latent: Side of the latents.
        disk: Bytes that all of it takes at the most.
        within: How far the memory model may be from what the training holds, as a share; None where the libraries hold
            more than all that the model counts.
    """

    name: str
    tiny: bool
    resolution: int
    latent: int
    disk: float
    within: float | None


REAL = Scale("sd21", False, 256, 32, 27e9, 0.10)
TINY = Scale("tiny", True, 64, 8, 2e8, None)


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: What `--only` takes.
        command: Module and flags of `python -m`, in the rehearsal's folder.
        makes: What it writes, of the rehearsal's folder; removed before it runs again.
        check: (the rehearsal's folder, the rows of the stages that ran) -> numbers for the row. Raises UserError if
            what the stage has left is not what it should be.
        seconds, gib: The limits.
        needs: Stages that must have run.
        drop: What nobody needs when it is done and checked.
        kill: Says, of the rehearsal's folder, when the process gets a SIGKILL; then it runs again with `--resume`.
    """

    name: str
    command: tuple[str, ...]
    makes: tuple[str, ...]
    check: Callable[[Path, Mapping[str, Row]], Row]
    seconds: float
    gib: float
    needs: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    kill: Callable[[Path], bool] | None = None


def stages(scale: Scale) -> tuple[Stage, ...]:
    """All stages, in order."""
    tiny, latent, pixels = ("--tiny",) * scale.tiny, str(scale.latent), str(scale.resolution)

    def prune(method: str, budget: str, seconds: float, gib: float, *more: str, keep: bool = False) -> Stage:
        limit = ("--budget", budget) if budget else ()
        command = ("bilevel_fast.prune", method, *limit, "--teacher", "sd21", "--out", method, *more)
        needs, drop = (("folder", "prepare images") if more else ("folder",)), (() if keep else (method,))
        return Stage(
            f"prune {method}", command, (method,), checks.pruned(method, float(budget or 1)), seconds, gib, needs, drop
        )

    return (
        Stage(
            "folder",
            ("benchmarks.real_size.folder", "sd21", *tiny),
            ("sd21", "images", "prompts.txt"), checks.folder, 100, 4,
        ),
        Stage(
            "prepare images",
            ("bilevel_fast.prepare", "folder", "--root", "images", "--model", "sd21", "--out", "cache",
             "--resolution", pixels, "--batch", "2", "--per-file", "2"),
            ("cache",), checks.cache("cache", 4, scale.latent), 60, 5, ("folder",),
        ),
        Stage(
            "prepare concepts",
            ("bilevel_fast.prepare", "concepts", "--model", "sd21", "--phrase", PHRASE, "--subjects", "prompts.txt",
             "--count", "2", "--steps", "2", "--batch", "2", "--size", latent, "--out", "bank"),
            ("bank",), checks.cache("bank", 2, scale.latent), 120, 8, ("folder",),
        ),
        prune("magnitude", "0.80", 90, 7),
        prune(STUDENT, "0.55", 70, 6, keep=True),
        prune("bk-sdm-small", "", 70, 6),
        prune("diff-pruning", "0.80", 600, 16, "--data", "cache", "--images", "2", "--batch", "1"),
        Stage(
            "train", TRAIN, ("run",), checks.trained, 500, 20,
            ("prepare images", "prepare concepts", f"prune {STUDENT}"), ("run/checkpoints",), half_way,
        ),
        Stage("memory model", ("benchmarks.real_size.memory", "memory.json"), ("memory.json",),
              checks.memory(scale.within), 40, 4, ("train",)),
        Stage(
            "erase uce",
            ("bilevel_fast.erase", "uce", "--model", STUDENT, "--erase", PHRASE, "--out", "erased"),
            ("erased",), checks.erased, 90, 6, (f"prune {STUDENT}",), ("erased",),
        ),
        Stage(
            "sample",
            ("bilevel_fast.sample", "--prompts-file", "prompts.txt", "--folder", "drawn", "--model", "run/student",
             "--size", latent, "--steps", "2", "--batch", "2"),
            ("drawn",), checks.drawn(scale.resolution), 90, 6, ("train",),
        ),
        Stage(
            "evaluate",
            ("bilevel_fast.evaluate", "--suite", "nsfw", "--images", "drawn", "--prompts", "prompts.txt",
             "--out", "eval.json"),
            ("eval.json", "eval.md"), checks.evaluated, 30, 3, ("sample",),
        ),
        Stage(
            "diffusers",
            ("benchmarks.real_size.pipeline", "run/student", "student.png", "--side", pixels),
            ("student.png",), checks.picture("student.png", scale.resolution), 90, 6, ("train",),
        ),
        Stage("speed", ("benchmarks.real_size.speed", "speed.jsonl", *tiny), ("speed.jsonl",), checks.timed, 450, 13),
    )  # fmt: skip


def half_way(out: Path) -> bool:
    """Whether the training's first checkpoint is whole: it is renamed when it is."""
    return (out / "run" / "checkpoints" / "student" / f"step-{HALF:06d}").is_dir()
