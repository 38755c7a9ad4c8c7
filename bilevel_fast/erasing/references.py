"""Who says what the student should answer: the dense teacher, the student as the run found it, or as it is now.

    teacher  the dense model; costs no memory
    start    a frozen copy of the student before its first step; costs its weights once more
    self     the student at this moment, without gradient; costs no memory, and moves

Two-stage methods start from a distilled student and take `start`. In a run that starts from a pruned and not yet
distilled student, that copy knows little: `teacher` is then the better source.
"""

import copy
import logging
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import Batch
from bilevel_fast.models.diffusion import Noised
from bilevel_fast.models.unet import UNet
from bilevel_fast.models.weights import digest_of
from bilevel_fast.training.lower import Answers
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.training.upper import Eraser

Source = Literal["teacher", "start", "self"]

_log = logging.getLogger(__name__)


class Start(Teacher):
    """A frozen copy of a student.

    It is not part of checkpoints: whoever resumes a run makes the same student again, and with it this copy. A
    checkpoint keeps its digest, so that a run never goes on with another one.

    Args:
        student: Before its first step, fp32.
        dtype: What the copy computes in.
    """

    def __init__(self, student: UNet, dtype: torch.dtype):
        self.digest = digest_of(student)
        super().__init__(copy.deepcopy(student).to(dtype))
        size = sum(p.numel() * p.element_size() for p in self.unet.parameters())
        _log.info("upper level: a frozen copy of the student as it starts takes %.1f MiB", size / 2**20)


class Itself(Teacher):
    """The student as it is, asked without gradient."""

    def __init__(self, student: UNet):
        self.unet = student  # neither frozen nor changed
        self.images = torch.zeros((), dtype=torch.int64, device=student.conv_in.weight.device)


class Sourced(Eraser):
    """An eraser whose target comes from a source."""

    def __init__(self, source: Teacher):
        self.source = source

    def look(self, answers: Answers, noised: Noised, batch: Batch, out: Tensor, target: Tensor) -> None:
        """Show `watch` how far the student has come on the concept, with the anchor's answer as target.

        The dense teacher says where it comes from: one more evaluation, and none where nobody watches.
        """
        if self.watch is not None:
            self.watch(out, answers.teacher.predict(noised, batch.text).out, target, 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.source.digest} if isinstance(self.source, Start) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if isinstance(self.source, Start) and state["start"] != self.source.digest:
            raise UserError(
                "the eraser's source is the student as the run started, and that is another one now: was --student or "
                "the teacher replaced? Start a new run in another --out"
            )
