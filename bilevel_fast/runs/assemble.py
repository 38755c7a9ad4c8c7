"""Both levels of a student, put together from the settings of a run, and its training from the first step to the last.

A run is a pure function of its configuration: batches and noise follow from the step number. An upper step belongs to
the lower step before it, and checkpoints lie between lower steps.
"""

import logging
from dataclasses import dataclass
from functools import partial

import torch

from bilevel_fast.base.devices import compute_dtype
from bilevel_fast.data.batch import Batch
from bilevel_fast.data.batches import Batches
from bilevel_fast.data.blend import Shares, weights_of
from bilevel_fast.data.loader import Loader
from bilevel_fast.data.sources import LatentSource
from bilevel_fast.erasing import loop_edits, solvers
from bilevel_fast.erasing import registry as erasers
from bilevel_fast.erasing.amnesia import fisher
from bilevel_fast.erasing.attention import Words
from bilevel_fast.erasing.controller import Controller
from bilevel_fast.erasing.saliency import salient
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.fp8 import QUANTISE_BYTES, kd_error, to_fp8
from bilevel_fast.models.text_encoder import TextEncoder
from bilevel_fast.models.unet import UNet
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.runs.fitting import Fitting, free_bytes
from bilevel_fast.scale.team import ALONE, Team
from bilevel_fast.training.checkpoint import GracefulStop
from bilevel_fast.training.fully_sharded import FullyShardedParameters
from bilevel_fast.training.levels import AnyLevel, Editing, Level, descend
from bilevel_fast.training.loop import LoopSettings, Places, Progress, run, running
from bilevel_fast.training.lower import Answers, FineTuning
from bilevel_fast.training.optim import AdamW, LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.sharded import ShardedParameters
from bilevel_fast.training.student import StudentTraining
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.training.upper import Suppression

_log = logging.getLogger(__name__)


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


def levels(
    config: TrainConfig,
    student: UNet,
    materials: Materials,
    device: torch.device,
    answers: Answers | None = None,
    team: Team = ALONE,
) -> tuple[Level, AnyLevel | None]:
    """Both levels over one set of student parameters; no upper one without concepts or with `upper.every` 0.

    The student's parameters move into flat buffers, in the precision of the configuration. The teacher is frozen, and
    otherwise as it was: where it lies elsewhere or has another dtype, a copy of it teaches. `answers` may be shared by
    students that are trained side by side. The ranks of `team` share batches and parameters.
    """
    lower, upper, dtype = config.lower, config.upper, compute_dtype(config.precision, device)
    schedule = materials.schedule.to(device)
    student.recompute = config.recompute
    suppress = materials.concepts is not None and upper.every > 0
    free = free_bytes(device, student, materials.teacher)
    micro = _fitting(config, student, materials, device, team).micro_batches(free)
    micro, leaves = (team.least(micro[0]), team.least(micro[1])), config.scale.leaves
    leaf = (lower.batch // leaves, upper.batch // leaves)
    split = micro[0] < leaf[0] or (suppress and micro[1] < leaf[1])
    if split:
        _log.info("computing %d of %d lower and %d of %d upper images at once", micro[0], leaf[0], micro[1], leaf[1])
    start = erasers.start(upper, student, dtype) if suppress else None
    if start is not None and config.scale.in_parts:
        start.share_out(device, dtype, team)
    flat = _flat(config, student, dtype, split, team, device)
    draw = partial(Batches, leaves=leaves, ranks=team.ranks)
    make = partial(AdamW, decay=config.ema or 0.0)
    optimizer = partial(LevelOptimizer, flat, clip_norm=config.clip_norm, make=make)
    loader = partial(Loader, device=device, seed=config.seed, timesteps=schedule.num_train_timesteps)
    encoder = materials.text_encoder

    batches = draw(materials.data, encoder, lower.batch, config.seed, level=0, p_uncond=lower.p_uncond)
    if answers is None:
        teacher = _teacher(config, materials.teacher, device, dtype, team)
        answers = Answers(teacher, schedule, config.seed, lower.snr_gamma)
        if config.fp8_teacher:
            with loader(batches) as ahead:
                answers.teacher = _in_fp8(answers, ahead(0).split(micro[0])[0])
    if lower.weights.guided:
        answers.null = encoder.encode([""]).to(device)
    fine_tuning = FineTuning(flat, answers, lower.weights, micro[0])
    first = Level("lower", loader(batches), fine_tuning, optimizer(lr=lower.lr, warmup=lower.warmup))
    if materials.concepts is None or not upper.every:
        return first, None
    kind = erasers.ERASERS[upper.eraser]
    if isinstance(kind, erasers.EditKind):
        ground = loop_edits.Ground(
            flat, materials.data, materials.concepts, encoder, schedule, config.seed, materials.guidance
        )
        return first, Editing(kind.make(upper, ground))
    lower_batches = batches
    batches = draw(materials.concepts, encoder, upper.batch, config.seed, level=1, anchor=upper.anchor)
    null = encoder.encode([""]).to(device)
    with loader(batches) as ahead, loader(lower_batches) as kept:
        look = partial(salient, student, answers, flat, ahead, micro=micro[1])
        words = partial(Words, encoder, materials.concepts)
        remember = partial(fisher, student, answers, flat, kept, lower.batch)
        parts = erasers.EraserParts(answers.teacher, start, flat, null, words, look, remember)
        eraser, pull = kind.make(upper, parts), erasers.pull(upper, parts)
    hold = erasers.holder(flat, upper.subset)
    controller = None
    if upper.controller.enabled:
        shares = Shares(weights_of(materials.concepts))
        together = flat if leaves > 1 else None
        controller = Controller(
            *(upper, lower.steps, device, len(shares.weights), lambda sample: shares(sample)[0], together),
            (leaves, team.ranks.leaves(leaves)),
        )
    making, penalty = optimizer(lr=upper.lr, warmup=upper.warmup), 0.0 if pull else upper.penalty
    if controller is not None:
        penalty = controller.penalty
    elif (moves := solvers.schedule_of(upper)) != "constant":
        # the optimizer counts upper steps, on the device and in checkpoints
        penalty = partial(solvers.weight_at, moves, upper.penalty, making.steps)
    suppression = Suppression(
        *(fine_tuning, eraser, penalty, upper.penalty_norm), hold=hold, surgery=upper.surgery, micro=micro[1],
        rule=solvers.rule_of(upper), pull=pull, envelope=solvers.envelope_of(upper, fine_tuning),
    )  # fmt: skip
    second = Level("upper", loader(batches), suppression, making, eraser=eraser)
    return (first, second) if controller is None else controller.take(first, second)


def _teacher(config: TrainConfig, unet: UNet, device: torch.device, dtype: torch.dtype, team: Team) -> Teacher:
    return Teacher.in_parts(unet, device, dtype, team) if config.scale.in_parts else Teacher.of(unet, device, dtype)


def _flat(
    config: TrainConfig, student: UNet, dtype: torch.dtype, split: bool, team: Team, device: torch.device
) -> FlatParameters:
    average, scale = config.ema is not None, config.scale
    if scale.in_parts:
        return FullyShardedParameters(
            student, dtype, average, team=team, leaves=scale.leaves, reduction=scale.reduction, device=device
        )
    if team.world == 1 and scale.leaves == 1:
        return FlatParameters(student, dtype, average, summed=split)
    return ShardedParameters(
        student, dtype, average, summed=split, team=team, leaves=scale.leaves, reduction=scale.reduction
    )


def _fitting(config: TrainConfig, student: UNet, materials: Materials, device: torch.device, team: Team) -> Fitting:
    dtype = compute_dtype(config.precision, device)
    graphs = device.type == "cuda" and not _without_graphs(config)
    latent, text = materials.data.latent_shape[-1], materials.text_encoder.length
    return Fitting(config, student.structure, latent, text, dtype, graphs, team.world)


def _without_graphs(config: TrainConfig) -> str:
    """Why steps run as they are; empty where they are recorded, on a GPU."""
    return "weights lie in parts" if config.scale.in_parts else "" if config.graphs else "--no-graphs"


def _in_fp8(answers: Answers, batch: Batch) -> Teacher:
    """The teacher in fp8; says how far its answers to a batch are from those it gave before."""
    exact, noised = answers.teacher.unet, answers.noise(batch)
    _log.warning(
        "--fp8-teacher: expected to be slower than bf16, not measured: quantising moves %d bytes an element, of 3 that "
        "would do",
        QUANTISE_BYTES,
    )
    fp8 = to_fp8(exact)
    found = kd_error(exact, fp8, noised.x, noised.t, batch.text)
    blocks = [value for name, value in found.items() if name.endswith("/relative") and not name.startswith("output")]
    _log.info(
        "fp8 teacher: its output is off by %.2f %% (%.1f dB), its blocks by %.2f to %.2f %%, on the first lower batch",
        *(100 * found["output/relative"], found["output/sqnr_db"], 100 * min(blocks), 100 * max(blocks)),
    )
    return Teacher(fp8)


def fit(
    config: TrainConfig,
    student: UNet,
    materials: Materials,
    places: Places,
    stop: GracefulStop,
    device: torch.device,
    team: Team = ALONE,
) -> Progress:
    """Train `student` in place up to `config.lower.steps`, from its latest checkpoint if there is one.

    Afterwards its parameters are its own again: fp32, and their moving average if `config.ema` is set.

    Raises:
        Interrupted: `stop` was requested; the state is saved.
        UserError: Too many steps in a row had a non-finite gradient (the state before them is saved), a checkpoint
            does not fit the student, or the device is out of memory.
    """
    try:
        lower, upper = levels(config, student, materials, device, team=team)
        without = _without_graphs(config)
        if config.graphs and without and device.type == "cuda":
            _log.info("no CUDA graphs: %s", without)
        training = StudentTraining(lower, upper, config.upper.every, device, not without, team)
        settings = LoopSettings(
            config.lower.steps, config.lower.batch, config.log_every, config.checkpoint_every, config.max_bad_steps
        )
        with running([level for level in (lower, upper) if level is not None], device):
            progress = run(training, settings, places, stop, team)
            if isinstance(upper, Editing) and config.lower.steps % config.upper.every:
                descend(upper, config.lower.steps // config.upper.every)  # what the last lower steps have moved back
            lower.optimizer.flat.release()
        return progress
    except torch.OutOfMemoryError as error:
        raise _fitting(config, student, materials, device, team).out_of_memory(device) from error
