"""How many kernels a step launches: the ops that reach a device, by kind. Needs no GPU.

    python -m benchmarks.counts.launches                    mini world on the CPU, SD 2.1 on the meta device
    python -m benchmarks.counts.launches --only sd21 --json
    python -m benchmarks.counts.launches --only sdxl        Stable Diffusion XL at 1024 px, and KOALA-700M cut from it

An op counts when torch dispatches it and it would run on a device: views and shapes do not (`profiling.cost`). The
mini world's steps are the engine's own, optimizer included and the data phase excluded, which works on the host; the
third step is counted, when lazy set-up is over. SD 2.1 has no weights here, so its steps run on the meta device, in
bf16 and through torch's ops: `profiling.meta_steps` has them of the same levels. A CUDA graph replays the same kernels
as one launch; torch.compile fuses some of them.
"""

import json
import tempfile
from collections import Counter as Tally
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.counts.roofline import ERASER
from benchmarks.machine import describe
from benchmarks.structures import counted, structure
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.structure import Structure
from bilevel_fast.ops.providers import ops
from bilevel_fast.profiling.cost import Cost, Counter
from bilevel_fast.profiling.meta_steps import Steps
from bilevel_fast.runs.assemble import levels
from bilevel_fast.runs.config import preset
from bilevel_fast.runs.session import gather, initial_student
from bilevel_fast.training.levels import descend
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini.materials import WORLD as mini
from bilevel_fast.worlds.mini.settings import Mini

LATENT, TEXT, BATCH = 64, 77, 16  # of SD 2.1 at 512 px; the batch changes no count
KINDS = ("conv", "linear", "attention", "norm", "pointwise", "optimizer", "copy", "other")

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the count."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the mini world's steps run."""
    only: Literal["mini", "sd21", "sdxl"] | None = None
    """Count only this; SDXL is counted only if asked for."""
    json: bool = False
    """One JSON object per row instead of a table."""


def count(step: Callable[[], object]) -> list[Cost]:
    """What one call launches outside the data phase."""
    with Counter() as counter:
        step()
    return [cost for cost in counter.costs if cost.room != "data"]


def mini_world(device: torch.device) -> dict[str, list[Cost]]:
    """The third lower and the third upper step of the preset `mini`."""
    config = replace(preset("mini"), mini=Mini(images=64, bank=16, bank_steps=2))
    folder = load_folder(TEACHER)
    teacher = folder.unet().to(device).requires_grad_(False)
    student = initial_student(config, folder, 8 if device.type == "cuda" else 1).to(device)
    with tempfile.TemporaryDirectory() as out:
        materials = gather(config, folder, teacher, mini.erased_concepts(config.erase), Path(out))
        lower, upper = levels(config, student, materials, device)
        assert upper is not None
        both = {"lower": lower, "upper": upper}
        for step in range(2):
            for level in both.values():
                descend(level, step)
        return {name: count(lambda level=level: descend(level, 2)) for name, level in both.items()}


def on_meta(kept: Structure, latent: int = LATENT) -> dict[str, list[Cost]]:
    """A lower and an upper step of a student, on the meta device in bf16, through torch's ops."""
    with ops("torch"):
        steps = Steps(kept, latent, TEXT, BATCH, torch.device("meta"), torch.bfloat16)
        levels = {"lower": steps.lower, "upper": steps.upper(ERASER)}
        return {name: steps.count(level) for name, level in levels.items()}


def rows(case: str, costs: list[Cost], provider: str, config: Row, device: Row) -> list[Row]:
    """One row per kind that occurs, and their sum under the kind `all`."""
    tally = Tally(cost.kind for cost in costs)
    kinds = {"all": len(costs), **{kind: tally[kind] for kind in (*KINDS, *sorted(set(tally) - set(KINDS)))}}
    shared = {"suite": "launches", "case": case, "provider": provider, "metric": "launches", "unit": "launches"}
    return [{**shared, "value": n, "config": {**config, "kind": kind}, **device} for kind, n in kinds.items() if n]


def measure(device: torch.device, only: str | None = None) -> list[Row]:
    """Rows of the counts, which are exact and the same on every machine of that kind.

    Raises:
        UserError: There is no such device.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU")
    found: list[Row] = []
    if only in (None, "mini"):
        # a count does not depend on the make of a CPU or on its threads; on a GPU, the table of providers decides
        where = describe(device) | ({"device": "cpu", "threads": None} if device.type == "cpu" else {})
        config = {"unet": "mini", "structure": "magnitude 0.80", "batch": BATCH}
        for name, costs in mini_world(device).items():
            found += rows(f"mini {name}", costs, "ours", config, where)
    if only in (None, "sd21"):
        where = describe(torch.device("cpu")) | {"device": "meta", "threads": None}
        for label in ("dense", "0.80"):
            config = {"unet": "sd21", "structure": label, "batch": BATCH, "latent": LATENT, "text": TEXT}
            for name, costs in on_meta(structure(label)).items():
                found += rows(f"sd21 {label} {name}", costs, "torch", config, where)
    if only == "sdxl":
        where, (size, students) = describe(torch.device("cpu")) | {"device": "meta", "threads": None}, counted("sdxl")
        for label in ("dense", "koala-700m"):
            config = {"unet": "sdxl", "structure": label, "batch": BATCH, "latent": size.latent, "text": TEXT}
            for name, costs in on_meta(students[label], size.latent).items():
                found += rows(f"sdxl {label} {name}", costs, "torch", config, where)
    return found


def table(found: list[Row]) -> str:
    """Aligned text: a line per case, a column per kind."""
    kinds = list(dict.fromkeys(row["config"]["kind"] for row in found))
    kinds.sort(key=lambda kind: (kind != "all", KINDS.index(kind) if kind in KINDS else len(KINDS)))
    values = {(row["case"], row["config"]["kind"]): row["value"] for row in found}
    cases = list(dict.fromkeys(row["case"] for row in found))
    label = max(map(len, cases)) + 2
    lines = [f"{'launches per step':<{label}}" + "".join(f"{kind:>11}" for kind in kinds)]
    lines += [f"{case:<{label}}" + "".join(f"{values.get((case, kind), 0):>11,}" for kind in kinds) for case in cases]
    return "\n".join(lines)


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.counts.launches", __doc__)
    found = measure(torch.device(settings.device), settings.only)
    print("\n".join(map(json.dumps, found)) if settings.json else table(found))


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
