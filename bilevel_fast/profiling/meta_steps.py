"""Both steps of a training, of the engine's own parts, with random weights and batches.

    steps = Steps(structure, latent=64, text=77, batch=16, device=torch.device("meta"), dtype=torch.bfloat16)
    costs = steps.count(steps.lower)    # what `training.levels.descend` launches, less the loader

On the meta device tensors have sizes and no values: a step is counted, or weighed, and takes no time of a card. On
another device it runs.
"""

import torch

from bilevel_fast.data.batch import Batch
from bilevel_fast.models.architecture import UNetConfig
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.profiling.cost import Cost, Counter
from bilevel_fast.training.levels import Level, move
from bilevel_fast.training.losses import DEFAULT_WEIGHTS, LossWeights
from bilevel_fast.training.lower import Answers, FineTuning
from bilevel_fast.training.optim import LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.training.upper import Eraser, Suppression


class Steps:
    """The levels of one student.

    Args:
        structure: Of the student; the teacher is dense.
        latent: Height and width of the latents.
        text: Text tokens.
        batch: Images of a step, of either level.
        device: Where the networks and the batch are.
        dtype: What the networks compute in.
        align: As `UNet`; the engine pads to 8 on a GPU.
        average: Whether a moving average of the student is kept.
        weights: Of the lower loss.

    Attributes:
        flat: The student's parameters.
        lower: The lower level.
    """

    def __init__(
        self,
        structure: Structure,
        latent: int,
        text: int,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        align: int = 8,
        average: bool = False,
        weights: LossWeights = DEFAULT_WEIGHTS,
    ):
        with device:
            self.flat = FlatParameters(student := UNet(structure.config, structure, align), dtype, average)
            teacher = Teacher(UNet(structure.config).to(dtype))
        self.student = student
        self.batch = random_batch(structure.config, latent, text, batch, device)
        answers = Answers(teacher, Schedule.sd().to(device), seed=0)
        if weights.guided:
            answers.null = self.batch.text[:1].clone()
        self.fine_tuning = FineTuning(self.flat, answers, weights)
        self.lower = Level(
            "lower", lambda _: self.batch, self.fine_tuning, LevelOptimizer(self.flat, lr=1e-6, warmup=1)
        )

    def upper(self, eraser: Eraser, penalty: float = 1.0) -> Level:
        """An upper level of the same student, with the lower loss as a penalty of the gradient's norm times `penalty`.

        With a penalty it follows a lower step, whose answers of the teacher it takes.
        """
        suppression = Suppression(self.fine_tuning, eraser, penalty, "grad")
        optimizer = LevelOptimizer(self.flat, lr=1e-6, warmup=1)
        return Level("upper", lambda _: self.batch, suppression, optimizer, eraser=eraser)

    def count(self, level: Level) -> list[Cost]:
        """What the second step of a level launches: the first one still sets up its statistics."""
        with Counter():
            move(level, self.batch)
        with Counter() as counter:
            move(level, self.batch)
        return counter.costs


def random_batch(config: UNetConfig, latent: int, text: int, batch: int, device: torch.device) -> Batch:
    """Random latents, noise, timesteps and states of captions and anchors, as a `Loader` brings them."""
    with device:
        latents, eps = torch.randn(2, batch, config.in_channels, latent, latent)
        states, anchor = torch.randn(2, batch, text + config.extra_rows, config.cross_attention_dim)
        return Batch(latents, states, anchor, torch.empty(0, dtype=torch.int64), eps, torch.randint(1000, (batch,)))
