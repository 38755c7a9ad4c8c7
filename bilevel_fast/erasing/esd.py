"""Erased Stable Diffusion (ESD, arXiv:2303.07345): the student learns on images that it has half painted itself.

    n ~ U{1, ..., S - 2}, x = n DDIM steps of S from noise, by the student on the concept's prompt with guidance
    L = mean (v_S(x, c) - [a - eta (c_0 - a)])^2,   c_0 = v_0(x, c),  a = v_0(x, anchor)

with a frozen model v_0. In the paper the anchor is the null prompt: `--upper.anchor null`. v_0 is asked once for both,
so a sample costs 3 evaluations and the 2 n of its painting; the released script asks 8 times and 2 n.

The released script can also ask for a third prompt, from which the concept is erased. A bank knows of none.
"""

import torch
from torch import Tensor

from bilevel_fast.data.batch import Batch
from bilevel_fast.erasing.references import Sourced
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, integers
from bilevel_fast.sampling.samplers import ddim_step, guided, timesteps
from bilevel_fast.training.losses import Loss, suppression_loss
from bilevel_fast.training.lower import Answers
from bilevel_fast.training.phases import phase
from bilevel_fast.training.teacher import Teacher


class Esd(Sourced):
    """ESD's loss. Latents of the batch are not looked at; noise and n are those of its global indices.

    Args:
        source: v_0.
        null: (1, L, D) states of the null prompt, for guidance.
        eta: How far the target lies beyond the anchor.
        guidance: Of the painting.
        steps: S, at least 3.
        compat: Tell the networks the timestep that the released script tells them, 19 too high for S = 50.

    Raises:
        UserError: The schedule has no grid of so many steps.
    """

    eager = "a sample is painted in a number of steps that changes from batch to batch"

    def __init__(self, source: Teacher, null: Tensor, eta: float, guidance: float, steps: int, compat: bool):
        super().__init__(source)
        self.null, self.eta, self.guidance, self.steps, self.compat = null, eta, guidance, steps, compat

    def loss(self, student: UNet, answers: Answers, batch: Batch) -> Loss:
        assert batch.anchor is not None, "an upper batch needs anchors"
        with phase("diffusion"):
            x, t, order = self.paint(student, answers, batch)
        text, anchor = batch.text[order], batch.anchor[order]
        target, concept = self.source.steered(x, t, text, anchor, self.eta)
        with phase("student"):
            out = student(x, t, text).out
        with phase("losses"):
            if self.watch is not None:
                self.watch(out, concept, target, 1 + self.eta, order)
            return suppression_loss(out, target)

    @torch.no_grad()
    def paint(self, student: UNet, answers: Answers, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Half painted latents (B, C, H, W), their timesteps (B,), and which row of the batch each is, (B,).

        Samples that take more steps come first, so that those still being painted are always the first rows; a sample
        that is done costs nothing.
        """
        schedule, grid = answers.schedule, timesteps(answers.schedule, self.steps)
        batch = batch.drawn(answers.seed, schedule.num_train_timesteps)
        assert batch.eps is not None
        done = 1 + integers(answers.seed, Stream.TIMESTEP, batch.index, self.steps - 2)
        done, order = done.sort(descending=True, stable=True)
        device = batch.eps.device
        rows = order.to(device)
        x, text = batch.eps[rows], batch.text[rows]
        for k, t in enumerate(grid[: int(done[0])]):
            active = int((done > k).sum())
            predict = guided(student, text[:active], self.null, self.guidance)
            out = predict(x[:active], torch.full((active,), t, device=device)).float()
            x[:active] = ddim_step(schedule, x[:active], out, t, grid[k + 1])
        return x, torch.tensor([self.timestep(schedule, int(n)) for n in done], device=device), rows

    def timestep(self, schedule: Schedule, n: int) -> int:
        """What the networks are told after n steps: the grid's next timestep, the true one.

        The released script counts off a grid of as many steps as there are timesteps, whose first one is higher.
        """
        if self.compat:
            count = schedule.num_train_timesteps
            return count - 1 + schedule.steps_offset - n * (count // self.steps)
        return timesteps(schedule, self.steps)[n]
