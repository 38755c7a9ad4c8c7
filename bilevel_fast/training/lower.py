"""The lower gradient: from a batch, through noise, teacher, student and losses, to the gradient of L_ft.

A batch may be computed a few images at a time (micro-batches), so that it need not fit into memory at once: the
gradients of the parts are added up. What the teacher said about the last lower batch is kept where the upper level's
penalty reads it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel_fast.data.batch import Batch
from bilevel_fast.models.diffusion import Noised, Schedule, noise
from bilevel_fast.models.unet import Prediction, UNet
from bilevel_fast.training.features import Heard, listened_to, listening
from bilevel_fast.training.losses import DEFAULT_WEIGHTS, Loss, LossWeights, Unprompted, fine_tuning_loss
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.phases import phase
from bilevel_fast.training.teacher import Teacher


@dataclass(frozen=True)
class Answered:
    """A noised batch and what the teacher said about it."""

    noised: Noised
    text: Tensor  # (B, L, D)
    teacher: Prediction
    heard: Heard = field(default_factory=dict)
    """What was heard inside the teacher."""
    free: Tensor | None = None  # (B, C, H, W)
    """The teacher's output without the prompt, where a loss wants it."""
    scale: Tensor | None = None  # (B,) fp32
    """Of the guidance away from it."""


class Answers:
    """Noises batches and asks the teacher.

    Args:
        seed: Timestep and noise are pure functions of it and of a sample's global index.
        snr_gamma: See `diffusion.noise`.

    Attributes:
        keeps: Whether the answers to the last lower batch stay, for the upper level's penalty.
        last: Those, a part of the batch each.
        listens: Names of the teacher's modules that a loss wants to hear.
        null: (1, L, D) states of the empty prompt, where a loss wants outputs without the prompt.
    """

    null: Tensor | None = None

    def __init__(self, teacher: Teacher, schedule: Schedule, seed: int, snr_gamma: float | None = 5.0):
        self.teacher, self.schedule, self.seed, self.snr_gamma = teacher, schedule, seed, snr_gamma
        self.keeps = False
        self.listens: tuple[str, ...] = ()
        self.last: tuple[Answered, ...] = ()

    def __call__(self, parts: Sequence[Batch]) -> Iterator[Answered]:
        """What the teacher says about each part of a lower batch, when it is asked for."""
        self.last = ()
        for part in parts:
            answered = self.ask(part)
            if self.keeps:
                self.last = (*self.last, answered)
            yield answered

    def ask(self, batch: Batch) -> Answered:
        noised = self.noise(batch)
        with listening(self.teacher.unet, self.listens) as heard:
            answer = self.teacher.predict(noised, batch.text)
        return Answered(noised, batch.text, answer, heard, *self.unprompted(noised, batch))

    def unprompted(self, noised: Noised, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """The teacher's output without the prompt and a guidance scale for each sample; None where nobody wants them.

        The scale is uniform in [2, 14], by the first number of the sample's noise: on the device, as a recorded step
        wants it, and a function of its index.
        """
        if self.null is None:
            return None, None
        out = self.teacher.predict(noised, self.null.expand_as(batch.text)).out
        first = batch.drawn(self.seed, self.schedule.num_train_timesteps).eps
        assert first is not None
        return out, 2 + 12 * torch.special.ndtr(first.flatten(1)[:, 0].float())

    def noise(self, batch: Batch) -> Noised:
        with phase("diffusion"):
            batch = batch.drawn(self.seed, self.schedule.num_train_timesteps)
            assert batch.eps is not None
            assert batch.t is not None
            return noise(self.schedule, batch.latents, batch.eps, batch.t, self.snr_gamma)


class SharedAnswers(Answers):
    """For students that are trained on the same batches side by side: the teacher is asked once per batch."""

    _index: Tensor | None = None

    def __call__(self, parts: Sequence[Batch]) -> Iterator[Answered]:
        index = torch.cat([part.index for part in parts])
        if self._index is None or not torch.equal(self._index, index):
            self._index, self.keeps = index, True
            return super().__call__(parts)
        return iter(self.last)


class FineTuning:
    """The lower gradient: L_ft of the student against data and teacher.

    Args:
        flat: The student's parameters.
        answers: Asks the teacher.
        weights: Of the terms of L_ft.
        micro: Images that are computed at once; a batch is a multiple of it. None: all of them.
    """

    def __init__(
        self,
        flat: FlatParameters,
        answers: Answers,
        weights: LossWeights = DEFAULT_WEIGHTS,
        micro: int | None = None,
    ):
        assert isinstance(flat.module, UNet)
        self.flat, self.student, self.answers, self.weights, self.micro = flat, flat.module, answers, weights, micro
        self.listens = listened_to(self.student, weights)
        answers.listens = tuple(dict.fromkeys((*answers.listens, *self.listens)))  # students may share a teacher

    def __call__(self, batch: Batch) -> Loss:
        parts = batch.split(self.micro or len(batch.latents))
        return descend((self.loss(answered) for answered in self.answers(parts)), len(parts), self.flat)

    def loss(self, answered: Answered) -> Loss:
        with phase("student"), listening(self.student, self.listens) as heard:
            student = self.student(answered.noised.x, answered.noised.t, answered.text)
        free = None
        if self.weights.guided:
            null, x = self.answers.null, answered.noised.x
            assert null is not None
            assert answered.free is not None
            assert answered.scale is not None
            with phase("student"):
                out = self.student(x, answered.noised.t, null.expand_as(answered.text)).out
            free = Unprompted(out, answered.free, answered.scale)
        with phase("losses"):
            return fine_tuning_loss(
                student, answered.teacher, answered.noised, self.weights, heard, answered.heard, free
            )


def descend(parts: Iterable[Loss], count: int, flat: FlatParameters, weight: float = 1.0, add: bool = False) -> Loss:
    """The mean of the losses of equal parts of a batch, detached; its gradient times `weight` goes into `flat`.

    Args:
        parts: Made when they are asked for: what a part keeps for its backward pass is gone before the next one.
        count: How many they are; other ranks have as many, of the same batch.
        flat: Holds the gradient; it adds up in fp32 if it was made for several parts.
        weight: Of the gradient.
        add: Add to the gradient that is there, instead of replacing it.
    """
    found: list[dict[str, Tensor]] = []
    for number, loss in enumerate(parts):
        share = weight / (count * flat.ranks)
        flat.expect(number, count, add)
        backward(loss.total if share == 1 else share * loss.total)
        with phase("optimizer"):
            flat.take(number, count, add)
        found.append({**loss.terms, "": loss.total.detach()})
        del loss
    if count * flat.ranks == 1:
        terms = found[0]
    else:
        with phase("losses"):
            table = flat.everywhere(torch.stack([torch.stack(list(part.values())) for part in found]))
            terms = {name: row.mean() for name, row in zip(found[0], table.T.contiguous(), strict=True)}
    return Loss(terms.pop(""), terms)


def backward(loss: Tensor) -> None:
    """Leave the gradient of a loss at the parameters."""
    with phase("backward"):
        loss.backward()
