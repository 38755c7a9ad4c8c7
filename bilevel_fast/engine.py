"""Train one student: levels, statistics, checkpoints, resume.

A run is a pure function of its configuration. Checkpoints lie between lower steps (an upper step belongs to the lower
step before it), batches and noise follow from the step number, so a run that was killed and resumed ends with the same
bits as one that was not.
"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bilevel_fast import checkpoint
from bilevel_fast.bilevel import Answers, FineTuning, Level, Suppression, bilevel
from bilevel_fast.config import TrainConfig
from bilevel_fast.data.batches import Batch, Batches
from bilevel_fast.data.sources import LatentSource
from bilevel_fast.diffusion import Schedule
from bilevel_fast.errors import UserError
from bilevel_fast.optim import LevelOptimizer
from bilevel_fast.stats import Console, JsonLines, Stats, tensorboard
from bilevel_fast.teacher import Teacher
from bilevel_fast.text_encoder import TextEncoder
from bilevel_fast.unet import UNet

_log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


@dataclass(frozen=True)
class Materials:
    """What a student is trained with. `concepts` is None where no concept is suppressed."""

    teacher: UNet
    schedule: Schedule
    text_encoder: TextEncoder
    data: LatentSource
    concepts: LatentSource | None


@dataclass(frozen=True)
class Places:
    """Where one student's training leaves its traces."""

    checkpoints: Path
    stats: Path
    events: Path


@dataclass(frozen=True)
class Progress:
    """How far a training is. `seconds` is time spent in steps, over all sessions."""

    step: int = 0
    upper_steps: int = 0
    images: int = 0
    seconds: float = 0.0


def levels(
    config: TrainConfig, student: UNet, materials: Materials, device: torch.device, answers: Answers | None = None
) -> tuple[Level, Level | None]:
    """Both levels over one set of student parameters; no upper one without concepts or with `upper.every` 0.

    `answers` may be shared by students that are trained side by side.
    """
    lower, upper = config.lower, config.upper
    answers = answers or Answers(
        Teacher(materials.teacher), materials.schedule.to(device), config.seed, lower.snr_gamma
    )
    fine_tuning = FineTuning(student, answers, lower.weights)
    batches = Batches(
        materials.data, materials.text_encoder, lower.batch, config.seed, level=0, p_uncond=lower.p_uncond
    )
    optimizer = partial(LevelOptimizer, list(student.parameters()), clip_norm=config.clip_norm)
    first = Level("lower", partial(_to, device, batches), fine_tuning, optimizer(lr=lower.lr, warmup=lower.warmup))
    if materials.concepts is None or not upper.every:
        return first, None
    batches = Batches(
        materials.concepts, materials.text_encoder, upper.batch, config.seed, level=1, anchor=upper.anchor
    )
    suppression = Suppression(fine_tuning, upper.eta, upper.penalty, upper.penalty_norm)
    second = Level("upper", partial(_to, device, batches), suppression, optimizer(lr=upper.lr, warmup=upper.warmup))
    return first, second


def _to(device: torch.device, batches: Batches, step: int) -> Batch:
    batch = batches(step)
    anchor = None if batch.anchor is None else batch.anchor.to(device)
    return Batch(batch.latents.to(device, non_blocking=True), batch.text.to(device), anchor, batch.index)


def fit(
    config: TrainConfig,
    student: UNet,
    materials: Materials,
    places: Places,
    stop: checkpoint.GracefulStop,
    device: torch.device,
) -> Progress:
    """Train `student` in place up to `config.lower.steps`, from its latest checkpoint if there is one.

    Raises:
        Interrupted: `stop` was requested; the state is saved.
        UserError: Too many steps in a row had a non-finite gradient (the state before them is saved), or a
            checkpoint does not fit the student.
    """
    lower, upper = levels(config, student, materials, device)
    both = {level.name: level for level in (lower, upper) if level is not None}
    progress = _restore(student, both, places.checkpoints)
    if progress.step >= config.lower.steps:
        return progress
    sinks = [
        Console(config.lower.steps, progress.step),
        JsonLines(places.stats, progress.step),
        tensorboard(places.events, progress.images),
    ]
    with Stats(sinks, images=progress.images, seconds=progress.seconds) as stats:
        for terms in bilevel(lower, upper, config.upper.every, progress.step, config.lower.steps):
            for name, value in terms.items():
                stats.report(name, value)
            step = progress.step + 1
            done = step == config.lower.steps
            progress = Progress(
                step=step,
                upper_steps=upper.optimizer.steps if upper is not None else 0,
                images=step * config.lower.batch,
                seconds=progress.seconds,
            )
            if step % config.log_every == 0 or done or stop.requested:
                rates = {f"{level.name}/lr": level.optimizer.next_lr for level in both.values()}
                record = stats.flush(step, progress.images, **rates)
                progress = Progress(step, progress.upper_steps, progress.images, record["seconds"])
                _check_finite(both, config.max_bad_steps, student, progress, places.checkpoints)
            if step % config.checkpoint_every == 0 or done or stop.requested:
                _save(student, both, progress, places.checkpoints)
            if stop.requested and not done:
                raise Interrupted(f"stopped after lower step {step} of {config.lower.steps}")
    return progress


def _save(student: UNet, both: dict[str, Level], progress: Progress, folder: Path) -> None:
    optimizers = {name: level.optimizer.state_dict() for name, level in both.items()}
    checkpoint.save(folder, progress.step, student.state_dict(), optimizers, vars(progress))


def _restore(student: UNet, both: dict[str, Level], folder: Path) -> Progress:
    found = checkpoint.latest(folder)
    if found is None:
        return Progress()
    try:
        student.load_state_dict(found.tensors)
        for name, level in both.items():
            level.optimizer.load_state_dict(found.optimizers[name])
        state: dict[str, Any] = found.state
        progress = Progress(**state)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"checkpoint {found.step} in {folder} does not fit this student: {reason}") from error
    _log.info("resuming %s after lower step %d", folder.name, progress.step)
    return progress


def _check_finite(both: dict[str, Level], limit: int, student: UNet, progress: Progress, folder: Path) -> None:
    """One read of the device per level, at the status line only."""
    for level in both.values():
        bad = int(level.optimizer.bad_in_a_row)
        if bad >= limit:
            _save(student, both, progress, folder)
            raise UserError(
                f"the last {bad} {level.name} steps had a non-finite gradient and were skipped; stopped at lower step "
                f"{progress.step}, the weights before them are saved in {folder}; lower --{level.name}.lr"
            )
