"""What the measurements of the drawn worlds share: the teacher, what a student is trained with, the judge, the rows."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import Row, append_rows
from bilevel_fast.base.files import mend
from bilevel_fast.models.diffusion import Noised, noise
from bilevel_fast.models.folder import ModelFolder, load_folder
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, integers, normal
from bilevel_fast.runs.assemble import Materials, levels
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.runs.session import gather, initial_student
from bilevel_fast.training.levels import AnyLevel, Level
from bilevel_fast.training.lower import SharedAnswers
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.worlds import drawn_world
from bilevel_fast.worlds.drawn import DrawnWorld
from bilevel_fast.worlds.mini.world import SCENES, labels, render

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Lab:
    """Students of one seed, trained side by side on the CPU: the teacher answers each batch once.

    Attributes:
        world: What is drawn.
        erased: Numbers of the styles that are erased.
    """

    config: TrainConfig
    world: DrawnWorld[Any]
    folder: ModelFolder
    teacher: UNet
    erased: list[int]
    materials: Materials
    answers: SharedAnswers

    @classmethod
    def set_up(cls, config: TrainConfig, bank: Path | None) -> "Lab":
        """`bank` is the folder of the concept bank, which is drawn where it is not there; None erases nothing."""
        world, settings = drawn_world(config.world), config.world_settings
        folder = load_folder(config.teacher or world.TEACHER)
        teacher = folder.unet().requires_grad_(False)
        erased = [] if bank is None else world.erased_concepts(config.erase)
        if bank is None:
            data = world.drawn_source(folder, [], settings.images, config.seed)
            materials = Materials(teacher, folder.schedule, folder.text_encoder, data, None, settings.guidance)
        else:
            materials = gather(config, folder, teacher, erased, bank)
        answers = SharedAnswers(Teacher(teacher), materials.schedule, config.seed, config.lower.snr_gamma)
        return cls(config, world, folder, teacher, erased, materials, answers)

    def student(self) -> UNet:
        """The pruned student that a run starts from."""
        return initial_student(self.config, self.folder, align=1)

    def levels(self, config: TrainConfig, student: UNet) -> tuple[Level, AnyLevel | None]:
        return levels(config, student, self.materials, CPU, self.answers)

    def judge(self, student: UNet) -> dict[str, Any]:
        """What the judge finds in a student's drawings."""
        config = self.config
        settings = config.world_settings
        portfolio = self.world.portfolio(student.eval(), self.folder, self.erased, settings, config.seed)
        return self.world.quality(portfolio, self.erased)


def noised(folder: ModelFolder, scenes: Sequence[int], indices: range) -> tuple[Noised, Tensor]:
    """Noised drawings of the scenes (B, 12, 16, 16) and their text states (B, L, D), functions of the indices."""
    size, channels = folder.config.sample_size, folder.config.in_channels
    images = render(*(column[torch.tensor(scenes)] for column in labels(SCENES)), seed=0, indices=indices)
    latents = folder.vae.moments(images)[:, :channels]
    t = integers(0, Stream.TIMESTEP, indices, folder.schedule.num_train_timesteps)
    eps = normal(0, Stream.NOISE, indices, (channels, size, size))
    text = folder.text_encoder.encode([SCENES[i].caption for i in scenes])
    return noise(folder.schedule, latents, eps, t, None), text


def read(path: Path) -> list[Row]:
    """All rows measured so far."""
    mend(path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def append(path: Path, row: Row) -> None:
    append_rows(path, [row])
