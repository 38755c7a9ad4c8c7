"""A few trainings of the mini world that a team shares; as a script, what each of torchrun's processes does.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/helpers/ranked.py FOLDER CASE[:STEPS[:NAME]] ...
"""

import contextlib
import copy
import dataclasses
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from bilevel_fast.base import errors
from bilevel_fast.base.devices import Ranks
from bilevel_fast.data.sources import MemorySource
from bilevel_fast.models.folder import load_folder
from bilevel_fast.runs.assemble import Materials, fit
from bilevel_fast.runs.session import gather, initial_student
from bilevel_fast.scale.team import Team
from bilevel_fast.train import parse
from bilevel_fast.training.loop import Places
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini.materials import erased_concepts

COMMON = ["--preset", "smoke", "--scale.leaves", "4", "--log-every", "1", "--checkpoint-every", "1000"]
BRIEF = ["--upper.every", "1", "--lower.warmup", "0", "--upper.warmup", "0"]
CASES = {
    # 20 bilevel steps: 20 lower ones and 5 upper ones
    "bilevel": ["--ema", "0.9", "--clip-norm", "1.0"],
    "anchor-kd": [*BRIEF, "--upper.eraser", "anchor-kd", "--upper.penalty-norm", "raw", "--upper.penalty", "3"],
    "concept-ablation": [*BRIEF, "--upper.eraser", "concept-ablation"],
    "esd": [*BRIEF, "--upper.eraser", "esd", "--upper.esd.steps", "4", "--upper.controller.enabled"],
    "salun": [*BRIEF, "--upper.eraser", "salun", "--upper.salun.batches", "1"],
    "erasediff": [*BRIEF, "--upper.eraser", "erasediff"],
    "forget-me-not": [*BRIEF, "--upper.eraser", "forget-me-not"],
    "surgery": [*BRIEF, "--upper.surgery", "--upper.subset", "esd-x"],
    "controller": [*BRIEF, "--upper.controller.enabled", "--erase", "pointillism", "waves", "--precision", "bf16"],
    "micro": [
        *BRIEF,
        *["--lower.batch", "8", "--upper.batch", "8", "--lower.micro-batch", "1", "--upper.micro-batch", "1"],
    ],
    "uce": ["--upper.every", "1", "--upper.eraser", "uce", "--ema", "0.9"],
    "concept-prune": [
        *["--upper.every", "1", "--upper.eraser", "concept-prune", "--upper.concept-prune.prompts", "1"],
        *["--upper.concept-prune.steps", "2", "--upper.concept-prune.guidance", "1"],
    ],
    "poisoned": ["--upper.every", "2"],
    "ring": ["--scale.reduction", "ring"],
}
ENDING = {"spoilt": ["--max-bad-steps", "2"]}
"""Ends with an error."""
STEPS = {"bilevel": 20, "poisoned": 6, "ring": 6}
POISONED = {"poisoned": 6, "spoilt": 64}
"""How many of the 64 images are not finite: some steps see one of them, on the rank that has it; or all do."""


class Poisoned(MemorySource):
    """The first images are not finite."""

    def __init__(self, source: MemorySource, count: int):
        self.__dict__ = {**vars(source), "count": count}

    def moments(self, indices, views):
        bad = torch.as_tensor(indices) < self.count
        return super().moments(indices, views).masked_fill(bad[:, None, None, None], float("nan"))


class World:
    """The mini world in a folder that all teams share: whoever comes first draws its banks."""

    def __init__(self, root: Path, team: Team):
        self.root, self.team, self.folder = root, team, load_folder(TEACHER)
        self.teacher, self.student = self.folder.unet(), initial_student(parse(COMMON), self.folder, 1)
        self.found: dict[Path, Materials] = {}

    def train(self, case: str, steps: int, out: Path) -> None:
        """From the last checkpoint in `out` to step `steps`."""
        config = parse([*COMMON, *(CASES | ENDING)[case]])
        config = dataclasses.replace(config, lower=dataclasses.replace(config.lower, steps=steps))
        images = config.upper.eraser == "concept-ablation"
        banks = self.root / "banks" / f"{len(config.erase)}-{'anchor' if images else 'prompt'}"
        if banks not in self.found:
            erased, first = erased_concepts(config.erase), self.team.rank == 0
            make = partial(gather, config, self.folder, self.teacher, erased, banks, record=first)
            self.found[banks] = self.team.in_turn(make)
        materials = self.found[banks]
        if case in POISONED:
            materials = dataclasses.replace(materials, data=Poisoned(materials.data, POISONED[case]))
        places = Places(out / "checkpoints", out / "stats.jsonl")
        if self.team.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
        self.team.first(lambda: None)
        stop = SimpleNamespace(requested=False)
        fit(config, copy.deepcopy(self.student), materials, places, stop, torch.device("cpu"), self.team)


def work(team: Team, root: Path, jobs: list[str]) -> None:
    """Train every `case:steps:name` of `jobs` in `root/name`."""
    world = World(root, team)
    for job in jobs:
        case, steps, name = (*job.split(":"), "", "")[:3]
        start = time.monotonic()
        world.train(case, int(steps or STEPS.get(case, 2)), root / (name or f"{case}-{team.world}"))
        if team.rank == 0:
            print(job, f"{time.monotonic() - start:.1f} s", flush=True)


def outcome(out: Path) -> dict[str, object]:
    """All that must not depend on the number of ranks: digests of what is saved, and what was said on the way."""
    (newest,) = sorted((out / "checkpoints").glob("step-*"))[-1:]
    files = json.loads((newest / "manifest.json").read_text())["files"]
    rows = [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
    said = [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]
    return {"step": newest.name, "said": said} | {n: f["sha256"] for n, f in files.items() if n != "state.json"}


def masters(out: Path) -> torch.Tensor:
    """Of the newest checkpoint, one after the other, fp64."""
    (newest,) = sorted((out / "checkpoints").glob("step-*"))[-1:]
    return torch.cat([value.double().flatten() for _, value in sorted(load_file(newest / "model.safetensors").items())])


def torchrun(
    count: int, *command: object, no_python: bool = False, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node COUNT`, on this machine and a free port; output and errors together in `stdout`."""
    process = start(count, *command, no_python=no_python)
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        raise AssertionError(f"torchrun has not ended after {timeout} s:\n{out}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, "")


def start(count: int, *command: object, no_python: bool = False) -> subprocess.Popen[str]:
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    words = [*agent, *(["--no-python"] if no_python else []), *map(str, command)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def ranks_of(agent: subprocess.Popen[str]) -> dict[int, int]:
    """The processes of a torchrun, by rank."""
    found = {}
    for line in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{line}/environ").read_bytes().split(b"\0")
            ranks = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
            found |= {rank: int(line) for rank in ranks}
    return found


def main() -> None:
    with Team.join(Ranks.from_environment()) as team:
        work(team, Path(sys.argv[1]), sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
