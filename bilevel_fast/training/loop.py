"""The run loop: steps, status lines, checkpoints, resume, and the end of a run that has gone wrong.

What is trained is a `Trainee`: a student (`training.student`), or APTP's router (`runs.router`). Checkpoints lie
between its steps, and what a step does follows from its number and the state before it: a run that was killed and
resumed ends, on a CPU, with the same bits as one that was not. On a GPU libraries choose their algorithms anew, and
some add in any order: there it is the same up to rounding.
"""

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.base.devices import settle_libraries
from bilevel_fast.base.errors import UserError
from bilevel_fast.ops.graphs import side_stream
from bilevel_fast.scale.team import ALONE, Team
from bilevel_fast.training import checkpoint
from bilevel_fast.training.levels import AnyLevel, Level
from bilevel_fast.training.optim import LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.saver import Saver, snapshots_for
from bilevel_fast.training.stats import Console, JsonLines, Means, Sink, Stats, tensorboard

_log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""


@dataclass(frozen=True)
class LoopSettings:
    """How long a run is, and how often it says and saves something.

    Attributes:
        steps: Steps in all.
        batch: Images per step.
        log_every: Steps per status line.
        checkpoint_every: Steps per checkpoint.
        max_bad_steps: The run ends after so many steps in a row whose gradient was not finite.
    """

    steps: int
    batch: int
    log_every: int
    checkpoint_every: int
    max_bad_steps: int


@dataclass(frozen=True)
class Places:
    """Where a run leaves its traces; no TensorBoard events without a folder for them."""

    checkpoints: Path
    stats: Path
    events: Path | None = None
    further: Sequence[Callable[[int], Sink]] = ()
    """Makers of further sinks, each called with the number of images that a resumed run has seen."""


@dataclass(frozen=True)
class Progress:
    """How far a training is. `seconds` is time spent in steps, over all sessions."""

    step: int = 0
    upper_steps: int = 0
    images: int = 0
    seconds: float = 0.0


class Trainee(ABC):
    """What a run trains.

    Attributes:
        name: For messages.
        step_name: What one of its steps is called, for messages.
        counters: Fields of `Progress` that its checkpoints hold.
        flat: Its parameters.
        optimizers: What moves them, by name in the checkpoint.
        means: What its steps have measured since the last status line.
    """

    name: str
    step_name: str = "step"
    counters: tuple[str, ...] = ("step", "upper_steps", "images", "seconds")
    flat: FlatParameters
    optimizers: Mapping[str, LevelOptimizer]
    means: Sequence[Means]

    @abstractmethod
    def steps(self, start: int, end: int) -> Generator[object, None, None]:
        """Take the steps `start` to `end` - 1; yields after each of them."""

    @abstractmethod
    def numbers(self) -> dict[str, Tensor | float]:
        """Numbers of this moment for the status line, such as learning rates."""

    @abstractmethod
    def lr_flag(self, name: str) -> str:
        """The flag that sets the learning rate of an optimizer."""

    def upper_steps(self, step: int) -> int:  # most have none
        """Upper steps among the first `step` steps."""
        return 0

    def extras(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint must hold beside parameters and optimizers, by name; copies where `flat.copies`."""
        return {}

    def load_extras(self, found: Mapping[str, dict[str, Any]]) -> None:
        """Take back what `extras` gave.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: It does not fit.
            UserError: The run would go on as another one.
        """
        assert not self.extras()


def run(
    trainee: Trainee, settings: LoopSettings, places: Places, stop: checkpoint.GracefulStop, team: Team = ALONE
) -> Progress:
    """Train up to `settings.steps`, from the latest checkpoint if there is one. To be called within `running`.

    All ranks of a team take the same steps and stop after the same one, whoever of them was asked to; the first one
    says and saves what there is.

    Raises:
        Interrupted: `stop` was requested; the state is saved.
        UserError: Too many steps in a row had a non-finite gradient (the state before them is saved), or a
            checkpoint does not fit.
    """
    progress = _restore(trainee, places.checkpoints, team)
    if progress.step >= settings.steps:
        return progress
    images, seconds = progress.step * settings.batch, progress.seconds
    console = Console(settings.steps, progress.step) if team.rank == 0 else None
    sinks = [console, *_sinks(places, progress.step, images)] if console else []
    saver = Saver(places.checkpoints, snapshots_for(trainee.flat))
    steps = trainee.steps(progress.step, settings.steps)
    with Stats(sinks, images=images, seconds=seconds) as stats, saver, contextlib.closing(steps):
        for step, _ in enumerate(steps, progress.step + 1):
            team.has_given(trainee.flat.master.device)
            # asked once: what is said to be saved must be
            stopped, images = team.any(stop.requested), step * settings.batch
            ends = stopped or step == settings.steps
            if console:
                console.at(step)
            if says := step % settings.log_every == 0 or ends:
                seconds = stats.flush(step, images, trainee.means, **trainee.numbers())["seconds"]
            progress = Progress(step, trainee.upper_steps(step), images, seconds)
            if says:
                _check_finite(trainee, settings.max_bad_steps, progress, saver, team)
            if step % settings.checkpoint_every == 0 or ends:
                _save(trainee, progress, saver, team)
            if stopped and step < settings.steps:
                saver.wait()
                raise Interrupted(f"stopped after {trainee.step_name} {step} of {settings.steps}")
    return progress


@contextlib.contextmanager
def running(levels: Sequence[AnyLevel], device: torch.device) -> Iterator[None]:
    """What steps need around them: the loaders of `levels` closed, settings of libraries, a stream to capture.

    Autograd's anomaly mode is off meanwhile: with it every gradient is read back, and no step can be recorded.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_anomaly_enabled():
            _log.warning(
                "autograd's anomaly mode is switched off for the training, whose loop skips bad gradients itself"
            )
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        for level in levels:
            if isinstance(level, Level):
                stack.enter_context(level.batches)  # pyright: ignore[reportArgumentType]  # those of a run are Loaders
        settle_libraries(device)
        if device.type == "cuda":
            stack.enter_context(side_stream(device))
        yield


def _sinks(places: Places, step: int, images: int) -> list[Sink]:
    sinks: list[Sink] = [JsonLines(places.stats, step)]
    if places.events is not None:
        sinks.append(tensorboard(places.events, images))
    sinks += [make(images) for make in places.further]
    return sinks


def _save(trainee: Trainee, progress: Progress, saver: Saver, team: Team) -> None:
    if trainee.flat.copies:
        saver.wait()  # before there is another copy
    optimizers = {name: optimizer.state_dict() for name, optimizer in trainee.optimizers.items()} | trainee.extras()
    state = {name: getattr(progress, name) for name in trainee.counters}
    tensors = trainee.flat.state_dict()  # all ranks have a part in it, and in what is above
    if team.rank == 0:
        saver.save(progress.step, tensors, optimizers, state)


def _restore(trainee: Trainee, folder: Path, team: Team) -> Progress:
    found = checkpoint.latest_of_all(folder, team)
    if found is None:
        return Progress()
    try:
        trainee.flat.load_state_dict(found.tensors)
        for name, optimizer in trainee.optimizers.items():
            optimizer.load_state_dict(found.optimizers[name])
        trainee.load_extras(found.optimizers)
        progress = Progress(**found.state)
    except UserError:
        raise
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"checkpoint {found.step} in {folder} does not fit this {trainee.name}: {reason}") from error
    if team.rank == 0:
        checkpoint.tidy(folder, progress.step)
    _log.info("resuming after %s %d, from %s", trainee.step_name, progress.step, folder)
    return progress


def _check_finite(trainee: Trainee, limit: int, progress: Progress, saver: Saver, team: Team) -> None:
    """One read of the device per optimizer, at the status line only."""
    for name, optimizer in trainee.optimizers.items():
        bad = int(optimizer.bad_in_a_row)
        if bad >= limit:
            _save(trainee, progress, saver, team)
            saver.wait()
            raise UserError(
                f"the last {bad} {name} steps had a non-finite gradient and were skipped; stopped at "
                f"{trainee.step_name} {progress.step}, the weights before them are saved in {saver.folder}; "
                f"lower {trainee.lr_flag(name)}"
            )
