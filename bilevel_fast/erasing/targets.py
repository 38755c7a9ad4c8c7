"""What the student should say to the concept's prompt: erasers that are a target for its output.

    guidance          y = a - eta (c - a)     the teacher, steered away from the concept (as ESD, arXiv:2303.07345)
    anchor-kd         y = a                   the teacher on the anchor's prompt (arXiv:2412.15341, eq. 6): eta = 0
    concept-ablation  y = a                   a frozen student on the anchor's prompt (arXiv:2303.13516), and a loss
                                              that keeps the anchor as it is

with a and c a source's outputs for anchor and concept at the student's own x_t: noised latents of the bank.
"""

import torch
import torch.nn.functional as F

from bilevel_fast.data.batch import Batch
from bilevel_fast.erasing.references import Sourced
from bilevel_fast.models.unet import UNet
from bilevel_fast.training.losses import Loss, suppression_loss
from bilevel_fast.training.lower import Answers
from bilevel_fast.training.phases import phase
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.training.upper import Eraser


class Guidance(Eraser):
    """Negative guidance from the dense teacher, or with eta 0 its plain answer to the anchor.

    Args:
        eta: See `Teacher.steered`. With 0 the teacher is not asked for the concept: half the price.
    """

    def __init__(self, eta: float):
        self.eta = eta

    def loss(self, student: UNet, answers: Answers, batch: Batch) -> Loss:
        assert batch.anchor is not None, "an upper batch needs anchors"
        noised, teacher = answers.noise(batch), answers.teacher
        concept = None
        if self.eta or self.watch:
            target, concept = teacher.steered(noised.x, noised.t, batch.text, batch.anchor, self.eta)
        else:
            target = teacher.predict(noised, batch.anchor).out
        with phase("student"):
            out = student(noised.x, noised.t, batch.text).out
        with phase("losses"):
            if self.watch is not None and concept is not None:
                self.watch(out, concept, target, 1 + self.eta)
            return suppression_loss(out, target)


class ConceptAblation(Sourced):
    """Concept Ablation, model-based (Kumari et al., arXiv:2303.13516), in the terms of the network's own output.

        L = mean (v_S(x_t, c) - v_0(x_t, a))^2 + keep mean (v_S(x_t, a) - v)^2

    with concept prompt c, anchor prompt a, frozen model v_0 and true target v. The images should show the anchor
    (`make_bank(shows="anchor")`): what is learnt is that the concept's prompt means what they show. The second term is
    the paper's regularisation: the diffusion loss on images and prompts of the anchor.

    Args:
        source: v_0. The released trainer takes the student itself without gradient, to save memory.
        keep: The weight of the regularisation; 0 does not compute it.
    """

    def __init__(self, source: Teacher, keep: float):
        super().__init__(source)
        self.keep = keep

    def loss(self, student: UNet, answers: Answers, batch: Batch) -> Loss:
        assert batch.anchor is not None, "an upper batch needs anchors"
        noised = answers.noise(batch)
        target = self.source.predict(noised, batch.anchor).out
        x, t, text = noised.x, noised.t, batch.text
        if self.keep:
            x, t, text = x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([text, batch.anchor])
        with phase("student"):
            out = student(x, t, text).out
        with phase("losses"):
            loss = suppression_loss(out[: len(target)], target)
            self.look(answers, noised, batch, out[: len(target)], target)
            if not self.keep:
                return loss
            anchor = F.mse_loss(out[len(target) :].float(), noised.target)
            return Loss(loss.total + self.keep * anchor, {**loss.terms, "anchor": anchor.detach()})
