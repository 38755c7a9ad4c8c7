"""The lower gradient: from a batch, through noise, teacher, student and losses, to the gradient of L_ft.

What the teacher said about a batch is kept: the upper level's penalty is taken on the last lower batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_fast.data.batch import Batch
from bilevel_fast.models.diffusion import Noised, Schedule, noise
from bilevel_fast.models.unet import Prediction, UNet
from bilevel_fast.training.losses import DEFAULT_WEIGHTS, Loss, LossWeights, fine_tuning_loss
from bilevel_fast.training.phases import phase
from bilevel_fast.training.teacher import Teacher


@dataclass(frozen=True)
class Answered:
    """A noised batch and what the teacher said about it."""

    noised: Noised
    text: Tensor  # (B, L, D)
    teacher: Prediction


class Answers:
    """Noises a batch and asks the teacher. The last answer is kept for the upper level's penalty.

    Args:
        seed: Timestep and noise are pure functions of it and of a sample's global index.
        snr_gamma: See `diffusion.noise`.
    """

    def __init__(self, teacher: Teacher, schedule: Schedule, seed: int, snr_gamma: float | None = 5.0):
        self.teacher, self.schedule, self.seed, self.snr_gamma = teacher, schedule, seed, snr_gamma
        self.last: Answered | None = None

    def __call__(self, batch: Batch) -> Answered:
        noised = self.noise(batch)
        self.last = Answered(noised, batch.text, self.teacher.predict(noised, batch.text))
        return self.last

    def noise(self, batch: Batch) -> Noised:
        with phase("diffusion"):
            batch = batch.drawn(self.seed, self.schedule.num_train_timesteps)
            assert batch.eps is not None
            assert batch.t is not None
            return noise(self.schedule, batch.latents, batch.eps, batch.t, self.snr_gamma)


class SharedAnswers(Answers):
    """For students that are trained on the same batches side by side: the teacher is asked once per batch."""

    _index: Tensor | None = None

    def __call__(self, batch: Batch) -> Answered:
        if self.last is None or self._index is None or not torch.equal(self._index, batch.index):
            self._index = batch.index
            return super().__call__(batch)
        return self.last


class FineTuning:
    """The lower gradient: L_ft of the student against data and teacher."""

    def __init__(self, student: UNet, answers: Answers, weights: LossWeights = DEFAULT_WEIGHTS):
        self.student, self.answers, self.weights = student, answers, weights

    def __call__(self, batch: Batch) -> Loss:
        loss = self.loss(self.answers(batch))
        backward(loss.total)
        return loss

    def loss(self, answered: Answered) -> Loss:
        with phase("student"):
            student = self.student(answered.noised.x, answered.noised.t, answered.text)
        with phase("losses"):
            return fine_tuning_loss(student, answered.teacher, answered.noised, self.weights)


def backward(loss: Tensor) -> None:
    """Add the gradient of a loss to that of the parameters."""
    with phase("backward"):
        loss.backward()
