"""Every eraser in a training of the mini world: a few steps, and the same run when it is stopped in between."""

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.registry import ERASERS, GradientKind
from bilevel_fast.models.folder import load_folder
from bilevel_fast.runs.assemble import Materials, fit
from bilevel_fast.runs.session import gather, initial_student
from bilevel_fast.train import parse
from bilevel_fast.training import checkpoint
from bilevel_fast.training.loop import Places
from bilevel_fast.worlds.mini.materials import WORLD

CPU = torch.device("cpu")
FLAGS = {"esd": ["--upper.esd.steps", "4"], "salun": ["--upper.salun.batches", "1"]}
FLAGS["selective-amnesia"] = ["--upper.fisher.samples", "1", "--upper.fisher.timesteps", "1"]
STATEFUL = ("concept-ablation", "esd", "salun", "selective-amnesia")
SMALL = ["--preset", "smoke", "--lower.batch", "1", "--upper.batch", "2", "--upper.every", "1"]
WARM = ["--lower.warmup", "0", "--upper.warmup", "0", "--checkpoint-every", "1", "--log-every", "1"]


class World:
    """The mini world, and one bank for all erasers that want the same images."""

    def __init__(self, root: Path, teacher: Path):
        self.root, self.folder = root, load_folder(teacher)
        self.student = initial_student(self.config("guidance"), self.folder, 1)
        self._materials: dict[str, Materials] = {}

    def config(self, name: str, *flags: str):
        return parse([*SMALL, *WARM, "--upper.eraser", name, *FLAGS.get(name, []), *flags])

    def materials(self, config) -> Materials:
        shows = ERASERS[config.upper.eraser].shows
        if shows not in self._materials:
            erased = WORLD.erased_concepts(config.erase)
            self._materials[shows] = gather(config, self.folder, self.folder.unet(), erased, self.root / shows)
        return self._materials[shows]

    def fit(self, config, out: Path, steps: int = 2, scale: float = 1.0) -> dict[str, torch.Tensor]:
        """Train up to a step, from the last checkpoint in `out`; the student's state afterwards."""
        config = dataclasses.replace(config, lower=dataclasses.replace(config.lower, steps=steps))
        student = copy.deepcopy(self.student)
        with torch.no_grad():
            student.conv_in.weight.mul_(scale)
        out.mkdir(exist_ok=True)
        places = Places(out / "checkpoints", out / "stats.jsonl", out / "events")
        fit(config, student, self.materials(config), places, SimpleNamespace(requested=False), CPU)
        return student.state_dict()


@pytest.fixture(scope="module")
def world(small_teacher, tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"), small_teacher)


@pytest.mark.parametrize("name", [name for name, kind in ERASERS.items() if isinstance(kind, GradientKind)])
def test_a_few_steps_and_the_same_run_when_stopped_in_between(world, tmp_path, name):
    config = world.config(name)
    whole = world.fit(config, tmp_path / "whole")
    if (
        name in STATEFUL
    ):  # of the others, nothing but the student and its optimizers is kept: tests/training/test_kill.py
        world.fit(config, tmp_path / "parts", steps=1)
        assert "eraser" in checkpoint.latest(tmp_path / "parts" / "checkpoints").optimizers
        resumed = world.fit(config, tmp_path / "parts")
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert all(value.isfinite().all() for value in whole.values())
    before = world.student.state_dict()
    assert any(not torch.equal(whole[key], before[key]) for key in whole)
    lines = (tmp_path / "whole" / "stats.jsonl").read_text().splitlines()
    assert ['"upper/suppression"' in line for line in lines] == [True, True]


def test_a_schedule_goes_on_where_it_was(world, tmp_path):
    """The optimizer's counter is all that it has: stopped in between, the same bits and the same lambda."""
    config = world.config("guidance", "--upper.penalty-schedule", "linear")
    whole = world.fit(config, tmp_path / "whole")
    world.fit(config, tmp_path / "parts", steps=1)
    parts = world.fit(config, tmp_path / "parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    rows = [json.loads(line) for line in (tmp_path / "parts" / "stats.jsonl").read_text().splitlines()]
    assert [row["upper/lambda"] for row in rows] == pytest.approx([0.1, 0.2])


def test_another_start_is_refused(world, tmp_path):
    """The frozen copy is made anew when a run is resumed: from another student it would be another run."""
    config = world.config("concept-ablation")
    world.fit(config, tmp_path, steps=1)
    with pytest.raises(UserError, match="the student as the run started, and that is another one now"):
        world.fit(config, tmp_path, scale=1.5)
    saved = checkpoint.latest(tmp_path / "checkpoints")
    assert set(saved.optimizers) == {"lower", "upper", "eraser"}


def test_guidance_has_nothing_to_save(world, tmp_path):
    world.fit(world.config("guidance"), tmp_path, steps=1)
    assert set(checkpoint.latest(tmp_path / "checkpoints").optimizers) == {"lower", "upper"}


def test_subset_and_surgery_from_the_command_line(world, tmp_path):
    """With the lower level at rest (its rate moves nothing that could be seen), only the subset moves."""
    config = world.config("guidance", "--upper.subset", "esd-x", "--upper.surgery", "--lower.lr", "1e-30")
    before, after = world.student.state_dict(), world.fit(config, tmp_path, steps=1)
    moved = {key for key in before if (before[key] - after[key]).abs().max() > 1e-20}
    assert moved
    assert all(".attn2." in key for key in moved)


def test_images_of_the_anchor(world):
    """Concept Ablation's bank: the same captions and anchors, other images."""
    concept, anchor = (world.materials(world.config(name)).concepts for name in ("guidance", "concept-ablation"))
    assert [concept.captions(i) for i in range(4)] == [anchor.captions(i) for i in range(4)]
    assert [concept.anchor(i) for i in range(4)] == [anchor.anchor(i) for i in range(4)]
    assert not torch.equal(concept.moments([0, 1], [0, 0]), anchor.moments([0, 1], [0, 0]))
    assert (concept.index.recipe.get("shows"), anchor.index.recipe["shows"]) == (None, "anchor")
