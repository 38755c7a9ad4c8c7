"""A few trainings of the mini world that a team shares; as a script, what each of torchrun's processes does.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/helpers/ranked.py FOLDER CASE[:STEPS[:NAME]] ...
"""

import contextlib
import copy
import dataclasses
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from safetensors.torch import load_file

from bilevel_fast.base import errors
from bilevel_fast.base.devices import Ranks
from bilevel_fast.data.sources import MemorySource
from bilevel_fast.erasing.registry import ERASERS, EditKind
from bilevel_fast.erasing.settings import Upper
from bilevel_fast.erasing.subsets import NAMES
from bilevel_fast.models.folder import load_folder
from bilevel_fast.runs.assemble import Materials, fit
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.runs.session import gather, initial_student
from bilevel_fast.scale import rows
from bilevel_fast.scale.team import Pending, Team
from bilevel_fast.train import parse
from bilevel_fast.training import student
from bilevel_fast.training.loop import Places
from bilevel_fast.worlds.mini.materials import WORLD
from forked import Started
from mini_folder import TINY, make_mini_folder
from replay import on_the_cpu

COMMON = [
    *["--preset", "smoke", "--log-every", "1", "--checkpoint-every", "1000"],
    *["--scale.leaves", "4", "--lower.batch", "4", "--upper.batch", "4"],
]
EDITED = ["--scale.leaves", "2", "--lower.batch", "2", "--lower.warmup", "0", "--upper.every", "1", "--ema", "0.9"]
BRIEF = [*EDITED, "--upper.batch", "2", "--upper.warmup", "0"]
"""For two ranks: all is there after a single step."""
SMALLER = {
    "esd": ["--upper.esd.steps", "4"],
    "salun": ["--upper.salun.batches", "1"],
    "selective-amnesia": ["--upper.fisher.samples", "2", "--upper.fisher.timesteps", "2"],
    "solver-ewc": ["--upper.fisher.samples", "1", "--upper.fisher.timesteps", "1"],
    "p-esd": [
        *["--upper.p-esd.updates", "1", "--upper.p-esd.steps", "3", "--upper.p-esd.batch", "1"],
        *["--upper.p-esd.lr", "2"],
    ],
    "concept-prune": [
        *["--upper.concept-prune.prompts", "1", "--upper.concept-prune.steps", "2"],
        *["--upper.concept-prune.guidance", "1"],
    ],
}


def choices() -> dict[str, list[str]]:
    """Every eraser, and for each setting of the upper level that is a choice, every one of its values."""
    found = {
        name: [*(EDITED if isinstance(kind, EditKind) else BRIEF), "--upper.eraser", name, *SMALLER.get(name, [])]
        for name, kind in ERASERS.items()
    }
    for name, hint in get_type_hints(Upper).items():
        reader = next((eraser for eraser, kind in ERASERS.items() if name in kind.reads), "guidance")
        flag, default = f"--upper.{name.replace('_', '-')}", getattr(Upper(), name)
        values = NAMES if name == "subset" else get_args(hint) if get_origin(hint) is Literal else ()
        for value in values:
            if value != default:
                found[f"{name}-{value}"] = [*found[reader], flag, value, *SMALLER.get(f"{name}-{value}", [])]
        if hint is bool:
            found[name] = [*found[reader], flag]
    return found


CASES = {
    # 20 bilevel steps: 20 lower ones and 5 upper ones
    "bilevel": ["--ema", "0.9", "--clip-norm", "1.0"],
    "ring": ["--scale.reduction", "ring", "--upper.every", "2"],
    "poisoned": ["--upper.every", "2"],
    **choices(),
    "controller": [*BRIEF, "--upper.controller.enabled", "--erase", "pointillism", "waves", "--precision", "bf16"],
    "micro": [
        *[*BRIEF, "--lower.batch", "8", "--upper.batch", "8", "--lower.micro-batch", "2", "--upper.micro-batch", "1"],
        "--recompute",
    ],
}
PARTS = ["--scale.parameters", "fsdp"]
IN_PARTS = {
    "fsdp": [*CASES["bilevel"], *PARTS],
    **{
        f"fsdp-{name}": [*CASES[name], *PARTS]
        for name in ("concept-ablation", "erasediff", "forget-me-not", "solver-meha", "subset-esd-x", "micro")
    },
}
"""Weights lie on all ranks in parts: the same up to rounding."""
RECORDED = {f"{name}-recorded": [*CASES[name], "--upper.every", "2"] for name in ("bilevel", "uce", "solver-meha")}
"""Their steps are recorded, sends and all, and replayed."""
ENDING = {"spoilt": ["--max-bad-steps", "2"]}
"""Ends with an error."""
UNREADABLE = "unreadable"
"""A job that one rank cannot do, and the others wait for."""
STEPS = {**dict.fromkeys(RECORDED, 10), "bilevel": 20, "fsdp": 20, "poisoned": 4, "ring": 4, "controller": 2}
POISONED = {"poisoned": 6, "spoilt": 64}
"""How many of the 64 images are not finite: some steps see one of them, on the rank that has it; or all do."""


def teacher(root: Path) -> Path:
    """A small one, of random weights; made by whoever comes first."""
    config = dataclasses.replace(TINY, sample_size=16)
    return root / "teacher" if (root / "teacher").exists() else make_mini_folder(root / "teacher", config=config)


class Poisoned(MemorySource):
    """The first images are not finite."""

    def __init__(self, source: MemorySource, count: int):
        self.__dict__ = {**vars(source), "count": count}

    def moments(self, indices, views):
        bad = torch.as_tensor(indices) < self.count
        return super().moments(indices, views).masked_fill(bad[:, None, None, None], float("nan"))


class World:
    """The mini world in a folder that all teams share: whoever comes first draws its banks.

    The student has several buckets on any number of ranks, and the last is a part of one.
    """

    def __init__(self, root: Path, team: Team):
        rows.BUCKET = 2
        self.root, self.team, self.folder = root, team, load_folder(team.in_turn(lambda: teacher(root)))
        self.teacher, self.student = self.folder.unet(), initial_student(self.config(), self.folder, 1)
        self.found: dict[Path, Materials] = {}

    def config(self, *flags: str) -> TrainConfig:
        return parse([*COMMON, "--teacher", str(self.folder.path), *flags])

    def train(self, case: str, steps: int, out: Path) -> None:
        """From the last checkpoint in `out` to step `steps`."""
        config = self.config(*(CASES | IN_PARTS | RECORDED | ENDING)[case])
        config = dataclasses.replace(config, lower=dataclasses.replace(config.lower, steps=steps))
        banks = self.root / "banks" / f"{len(config.erase)}-{ERASERS[config.upper.eraser].shows}"
        if banks not in self.found:
            erased, first = WORLD.erased_concepts(config.erase), self.team.rank == 0
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
        with recorded(self.team.world) if case in RECORDED else contextlib.nullcontext():
            fit(config, copy.deepcopy(self.student), materials, places, stop, torch.device("cpu"), self.team)


class Awaited:
    """Collectives of a recording: one that nobody waits for is still on another stream when a CUDA graph ends."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.sent, self.waited, self.recordings = 0, 0, 0
        for name in ("exchange", "gather", "add_up"):
            patch.setattr(Team, name, self.counted(getattr(Team, name)))

    def counted(self, send: Callable[..., Pending]) -> Callable[..., Pending]:
        def call(*arguments: Any) -> Pending:
            self.sent += 1
            return SimpleNamespace(wait=partial(self.wait, send(*arguments)))

        return call

    def wait(self, pending: Pending) -> None:
        self.waited += 1
        pending.wait()

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        assert self.sent == self.waited, "on their way when a recording begins"
        before = self.sent
        found = on_the_cpu(call)
        assert before < self.sent == self.waited
        self.recordings += 1
        return found


@contextlib.contextmanager
def recorded(world: int) -> Iterator[None]:
    """Steps are recorded and replayed, by several ranks; with ops that leave no number to Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BILEVEL_FAST_OPS", "torch")
        awaited = Awaited(patch)
        if world > 1:
            patch.setattr(student, "cuda_recorder", lambda device: awaited.record)
        yield
        assert awaited.recordings >= 4 * (world > 1), "the lower step's, before and after upper ones, and theirs"


def work(team: Team, root: Path, jobs: list[str]) -> None:
    """Train every `case:steps:name` of `jobs` in `root/name`."""
    world = World(root, team)
    for job in jobs:
        if job == UNREADABLE:
            if team.rank == 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO), "latents.bin")
            team.first(lambda: time.sleep(60))
        case, steps, name = (*job.split(":"), "", "")[:3]
        start = time.monotonic()
        world.train(case, int(steps or STEPS.get(case, 1)), root / (name or f"{case}-{team.world}"))
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


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Crew:
    """`python -m bilevel_fast.NAME ARGUMENTS` in so many ranks, without torchrun: forked from the tests' server.

    Args:
        count: How many.
        name, arguments, package: See `Started`.
        log: The file that gets what all of them say.
        own: Of some ranks, arguments that the others do not get.
        environment: Variables that all find set.
    """

    begun: ClassVar[list["Crew"]] = []

    def __init__(
        self,
        count: int,
        name: str,
        *arguments: Any,
        log: Path,
        own: Mapping[int, Sequence[str]] | None = None,
        environment: Mapping[str, str] | None = None,
        package: str = "bilevel_fast.",
    ):
        self.log, port = log, free_port()
        self.begun.append(self)
        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(count), **(environment or {})}
        self.ranks = [
            Started(
                *(name, *arguments, *(own or {}).get(rank, ())),
                log=log,
                environment={"RANK": str(rank), "LOCAL_RANK": str(rank), **common},
                package=package,
            )
            for rank in range(count)
        ]

    def runs(self) -> bool:
        return all(rank.runs() for rank in self.ranks)

    def said(self) -> str:
        return self.log.read_text()

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit codes, by rank; those that are not gone in time are killed."""
        deadline = time.monotonic() + seconds
        try:
            return [rank.wait(max(deadline - time.monotonic(), 0)) for rank in self.ranks]
        except AssertionError:
            raise AssertionError(f"ranks have not ended after {seconds} s:\n{self.said()}") from None
        finally:
            self.end()

    def end(self) -> None:
        """Nobody is left."""
        for rank in self.ranks:
            if rank.runs():
                rank.send(signal.SIGKILL)


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


def start(count: int, *command: object, no_python: bool = False, restarts: int = 0) -> subprocess.Popen[str]:
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    agent += ["--max-restarts", str(restarts)]
    words = [*agent, *(["--no-python"] if no_python else []), *map(str, command)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if restarts else {})
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
