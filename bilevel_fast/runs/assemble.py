"""Train one student: levels, statistics, checkpoints, resume.

A run is a pure function of its configuration. Checkpoints lie between lower steps (an upper step belongs to the lower
step before it), batches and noise follow from the step number, so a run that was killed and resumed ends with the same
bits as one that was not.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import Batch
from bilevel_fast.data.batches import Batches
from bilevel_fast.data.blend import Shares, weights_of
from bilevel_fast.data.loader import Loader
from bilevel_fast.data.sources import LatentSource
from bilevel_fast.erasing import loop_edits
from bilevel_fast.erasing import registry as erasers
from bilevel_fast.erasing.attention import Words
from bilevel_fast.erasing.controller import Controller
from bilevel_fast.erasing.saliency import salient
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.fp8 import kd_error, to_fp8
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.graphs import cuda_recorder, side_stream
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.training import checkpoint
from bilevel_fast.training.graphs import Graphs
from bilevel_fast.training.levels import AnyLevel, Editing, Level, bilevel, descend
from bilevel_fast.training.lower import Answers, FineTuning
from bilevel_fast.training.optim import AdamW, LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.stats import Console, JsonLines, Stats, tensorboard
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.training.upper import Suppression

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
    guidance: float
    """Classifier-free guidance scale that the teacher is sampled with."""


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
) -> tuple[Level, AnyLevel | None]:
    """Both levels over one set of student parameters; no upper one without concepts or with `upper.every` 0.

    The student's parameters move into flat buffers, in the precision of the configuration; so does the teacher.
    `answers` may be shared by students that are trained side by side.
    """
    lower, upper, dtype = config.lower, config.upper, compute_dtype(config.precision, device)
    schedule = materials.schedule.to(device)
    student.recompute = config.recompute
    suppress = materials.concepts is not None and upper.every > 0
    start = erasers.start(upper, student, dtype) if suppress else None
    flat = FlatParameters(student, dtype, average=config.ema is not None)
    make = partial(AdamW, decay=config.ema or 0.0)
    optimizer = partial(LevelOptimizer, flat, clip_norm=config.clip_norm, make=make)
    loader = partial(Loader, device=device, seed=config.seed, timesteps=schedule.num_train_timesteps)
    encoder = materials.text_encoder

    batches = Batches(materials.data, encoder, lower.batch, config.seed, level=0, p_uncond=lower.p_uncond)
    if answers is None:
        unet = materials.teacher.to(dtype)
        answers = Answers(Teacher(unet), schedule, config.seed, lower.snr_gamma)
        if config.fp8_teacher:
            with loader(batches) as ahead:
                answers.teacher = _in_fp8(answers, ahead(0))
    fine_tuning = FineTuning(student, answers, lower.weights)
    first = Level("lower", loader(batches), fine_tuning, optimizer(lr=lower.lr, warmup=lower.warmup))
    if materials.concepts is None or not upper.every:
        return first, None
    if upper.eraser in erasers.EDITS:
        ground = loop_edits.Ground(
            flat, materials.data, materials.concepts, encoder, schedule, config.seed, materials.guidance
        )
        return first, Editing(loop_edits.make(upper, ground))
    batches = Batches(materials.concepts, encoder, upper.batch, config.seed, level=1, anchor=upper.anchor)
    null = encoder.encode([""]).to(device)
    with loader(batches) as ahead:
        look = partial(salient, student, answers, flat, ahead)
        words = partial(Words, encoder, materials.concepts)
        eraser = erasers.make(upper, erasers.Scene(answers.teacher, start, flat, null, words, look))
    hold = erasers.holder(flat, upper.subset)
    controller = None
    if upper.controller.enabled:
        shares = Shares(weights_of(materials.concepts))
        controller = Controller(upper, lower.steps, device, len(shares.weights), lambda sample: shares(sample)[0])
    penalty = upper.penalty if controller is None else controller.penalty
    suppression = Suppression(fine_tuning, eraser, penalty, upper.penalty_norm, flat, hold=hold, surgery=upper.surgery)
    making = optimizer(lr=upper.lr, warmup=upper.warmup)
    second = Level("upper", loader(batches), suppression, making, eraser=eraser)
    return (first, second) if controller is None else controller.take(first, second)


def _in_fp8(answers: Answers, batch: Batch) -> Teacher:
    """The teacher in fp8; says how far its answers to a batch are from those it gave before."""
    exact, noised = answers.teacher.unet, answers.noise(batch)
    fp8 = to_fp8(exact)
    found = kd_error(exact, fp8, noised.x, noised.t, batch.text)
    blocks = [value for name, value in found.items() if name.endswith("/relative") and not name.startswith("output")]
    _log.info(
        "fp8 teacher: its output is off by %.2f %% (%.1f dB), its blocks by %.2f to %.2f %%, on the first lower batch",
        *(100 * found["output/relative"], found["output/sqnr_db"], 100 * min(blocks), 100 * max(blocks)),
    )
    return Teacher(fp8)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the networks compute in: for `auto`, bf16 on a GPU that has it in hardware (sm_80 and later), else fp32."""
    if precision == "auto":
        hardware = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if hardware else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def fit(
    config: TrainConfig,
    student: UNet,
    materials: Materials,
    places: Places,
    stop: checkpoint.GracefulStop,
    device: torch.device,
) -> Progress:
    """Train `student` in place up to `config.lower.steps`, from its latest checkpoint if there is one.

    Afterwards its parameters are its own again: fp32, and their moving average if `config.ema` is set.

    Raises:
        Interrupted: `stop` was requested; the state is saved.
        UserError: Too many steps in a row had a non-finite gradient (the state before them is saved), or a
            checkpoint does not fit the student.
    """
    lower, upper = levels(config, student, materials, device)
    with running([level for level in (lower, upper) if level is not None], device):
        progress = _steps(config, lower, upper, places, stop, device)
        if isinstance(upper, Editing) and config.lower.steps % config.upper.every:
            descend(upper, config.lower.steps // config.upper.every)  # what the last lower steps have moved back
        lower.optimizer.flat.release()
    return progress


@contextlib.contextmanager
def running(both: Sequence[AnyLevel], device: torch.device) -> Iterator[None]:
    """What the steps of `levels` need around them: loaders that are closed, library settings, a stream to capture."""
    with contextlib.ExitStack() as stack:
        for level in both:
            if isinstance(level, Level):
                stack.enter_context(level.batches)  # pyright: ignore[reportArgumentType]  # levels() makes Loaders
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # shapes do not change
            torch.set_float32_matmul_precision("high")
            stack.enter_context(side_stream(device))
        yield


def _steps(
    config: TrainConfig,
    lower: Level,
    upper: AnyLevel | None,
    places: Places,
    stop: checkpoint.GracefulStop,
    device: torch.device,
) -> Progress:
    both: dict[str, AnyLevel] = {level.name: level for level in (lower, upper) if level is not None}
    progress = _restore(both, places.checkpoints)
    if progress.step >= config.lower.steps:
        return progress
    sinks = [
        Console(config.lower.steps, progress.step),
        JsonLines(places.stats, progress.step),
        tensorboard(places.events, progress.images),
    ]
    graphs = Graphs(cuda_recorder(device) if config.graphs else None)
    with Stats(sinks, images=progress.images, seconds=progress.seconds) as stats:
        for _ in bilevel(lower, upper, config.upper.every, progress.step, config.lower.steps, graphs):
            step = progress.step + 1
            done = step == config.lower.steps
            pace = upper.pace if isinstance(upper, Level) else None
            upper_steps = pace.upper_steps if pace else step // config.upper.every if upper is not None else 0
            progress = Progress(step, upper_steps, step * config.lower.batch, progress.seconds)
            if step % config.log_every == 0 or done or stop.requested:
                rates = {f"{name}/lr": optimizer.next_lr for name, optimizer in _optimizers(both).items()}
                rates |= {"upper/every": pace.every} if pace else {}
                record = stats.flush(step, progress.images, [level.means for level in both.values()], **rates)
                progress = replace(progress, seconds=record["seconds"])
                _check_finite(both, config.max_bad_steps, progress, places.checkpoints)
            if step % config.checkpoint_every == 0 or done or stop.requested:
                _save(both, progress, places.checkpoints)
            if stop.requested and not done:
                raise Interrupted(f"stopped after lower step {step} of {config.lower.steps}")
    return progress


def _optimizers(both: dict[str, AnyLevel]) -> dict[str, LevelOptimizer]:
    """An edit has none."""
    return {name: level.optimizer for name, level in both.items() if isinstance(level, Level)}


def _save(both: dict[str, AnyLevel], progress: Progress, folder: Path) -> None:
    flat = _optimizers(both)["lower"].flat
    optimizers = {name: optimizer.state_dict() for name, optimizer in _optimizers(both).items()}
    if flat.average is not None:
        optimizers["average"] = flat.state_dict(flat.average)
    for level in both.values():
        if level.eraser is not None and (state := level.eraser.state_dict()):
            optimizers["eraser"] = state
        if isinstance(level, Level) and level.pace is not None:
            optimizers["pace"] = level.pace.state_dict()
    checkpoint.save(folder, progress.step, flat.state_dict(), optimizers, vars(progress))


def _restore(both: dict[str, AnyLevel], folder: Path) -> Progress:
    found, flat = checkpoint.latest(folder), _optimizers(both)["lower"].flat
    if found is None:
        return Progress()
    try:
        flat.load_state_dict(found.tensors)
        for name, optimizer in _optimizers(both).items():
            optimizer.load_state_dict(found.optimizers[name])
        if flat.average is not None:
            flat.load_state_dict(found.optimizers["average"], flat.average)
        for level in both.values():
            # masks that an edit finds on its way are in the checkpoint before they are in the edit
            if level.eraser is not None and ("eraser" in found.optimizers or level.eraser.state_dict()):
                level.eraser.load_state_dict(found.optimizers["eraser"])
            if isinstance(level, Level) and level.pace is not None:
                level.pace.load_state_dict(found.optimizers["pace"])
        state: dict[str, Any] = found.state
        progress = Progress(**state)
    except UserError:
        raise
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"checkpoint {found.step} in {folder} does not fit this student: {reason}") from error
    _log.info("resuming %s after lower step %d", folder.name, progress.step)
    return progress


def _check_finite(both: dict[str, AnyLevel], limit: int, progress: Progress, folder: Path) -> None:
    """One read of the device per level, at the status line only."""
    for name, optimizer in _optimizers(both).items():
        bad = int(optimizer.bad_in_a_row)
        if bad >= limit:
            _save(both, progress, folder)
            raise UserError(
                f"the last {bad} {name} steps had a non-finite gradient and were skipped; stopped at lower step "
                f"{progress.step}, the weights before them are saved in {folder}; lower --{name}.lr"
            )
