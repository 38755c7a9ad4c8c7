"""What the student should say to the concept's prompt: erasers that are a target for its output.

    guidance          y = a - eta (c - a)     the teacher, steered away from the concept (as ESD, arXiv:2303.07345)
    anchor-kd         y = a                   the teacher on the anchor's prompt (arXiv:2412.15341, eq. 6): eta = 0

with a and c the teacher's outputs for anchor and concept at the student's own x_t: noised latents of the bank.
"""

from bilevel_fast.bilevel import Answers, Eraser
from bilevel_fast.data.batches import Batch
from bilevel_fast.losses import Loss, suppression_loss
from bilevel_fast.rooms import room
from bilevel_fast.unet import UNet


class Guidance(Eraser):
    """Negative guidance from the dense teacher, or with eta 0 its plain answer to the anchor.

    Args:
        eta: See `Teacher.steer`. With 0 the teacher is not asked for the concept: half the price.
    """

    def __init__(self, eta: float):
        self.eta = eta

    def loss(self, student: UNet, answers: Answers, batch: Batch) -> Loss:
        assert batch.anchor is not None, "an upper batch needs anchors"
        noised, teacher = answers.noise(batch), answers.teacher
        if self.eta:
            target = teacher.steer(noised, batch.text, batch.anchor, self.eta)
        else:
            target = teacher.predict(noised, batch.anchor).out
        with room("student"):
            out = student(noised.x, noised.t, batch.text).out
        with room("losses"):
            return suppression_loss(out, target)
