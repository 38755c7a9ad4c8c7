"""The upper step's plug-ins, and what is done with their gradient.

    Eraser  has a loss on concept images; `Suppression` descends it, with the lower loss on the last lower batch as a
            penalty: grad [L_CU(theta) + lambda L_ft(theta)]
    Edit    changes the weights outright

`bilevel_fast.erasing` has them by name. The penalty's batch is noised already and the teacher's answer to it is at
hand, so it costs a forward and backward pass of the student (which has moved) and none of the teacher.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from bilevel_fast.data.batch import Batch
from bilevel_fast.models.unet import UNet
from bilevel_fast.training.envelope import Envelope
from bilevel_fast.training.losses import Loss
from bilevel_fast.training.lower import Answers, FineTuning, descend
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.phases import phase

PenaltyNorm = Literal["grad", "raw"]

Terms = dict[str, Tensor]
"""What a step measured, scalars on the device."""

Pull = Callable[[FlatParameters], Tensor]
"""pull(flat) adds the gradient of a term of the weights alone to `flat.gradient`, and returns the term, () fp32."""

Rule = Callable[[Tensor, FlatParameters], None]
"""rule(g, flat): g (m,) is the suppression gradient, `flat.gradient` the lower loss's, and then what is descended."""


class Plugin:
    """What `--upper.eraser` names.

    Attributes:
        eager: Why a step of it cannot be recorded as a CUDA graph; empty where it can. A step that can reads nothing
            back from the device, and does the same on every batch.
    """

    eager: str = ""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that a resumed run cannot make again; empty without such."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            UserError: The run would go on as another one.
        """
        assert not state


class Eraser(Plugin, ABC):
    """What the upper level descends on a batch of the concept.

    Attributes:
        rule: How its gradient and that of the lower loss become one: see `Suppression`; None leaves it to the settings.
        pull: A term of the weights alone that it descends as well; None where it has none.
        watch: Wants to see how far the student has come, in every step; None where nobody does.
    """

    rule: Rule | None = None
    pull: Pull | None = None
    watch: "Watch | None" = None

    @abstractmethod
    def loss(self, student: UNet, answers: Answers, batch: Batch) -> Loss:
        """The loss of a concept batch, with gradient to the student and to nothing else.

        Args:
            student: As it is now.
            answers: The teacher, the schedule and the seed, and how a batch is noised.
            batch: Concept images with their captions' states, and those of their anchors.
        """

    def hold(self) -> None:  # most hold nothing
        """Zero the gradient of what the upper level must not move; called after every backward pass."""


class Edit(Plugin, ABC):
    """A change of the student's weights that the upper level makes again and again, between lower steps."""

    def prepare(self, step: int) -> None:  # most are prepared when they are made
        """Called before upper step `step`, and never recorded."""

    @abstractmethod
    def apply(self) -> Terms:
        """Change the masters, what computes, and the average where there is one; return what it measured."""


Watch = Callable[..., None]
"""watch(out, concept, target, reach[, order]): see `erasing.controller.Controller.watch`."""


class Suppression:
    """The upper gradient: an eraser's loss on the concept batch, and the lower loss on the last lower batch.

    Args:
        lower: Its student, teacher and last batch are the upper level's as well.
        eraser: Gives the loss of the concept batch.
        penalty: lambda; a rule does not read it. Where it changes from step to step, a tensor () or what makes one.
        penalty_norm: `grad` scales the penalty's gradient to the norm of the suppression gradient before lambda;
            `raw` adds lambda L_ft as the paper writes it.
        hold: Zeroes the gradient of parameters that the upper level leaves alone, if there are such. A gradient that
            was zero in all upper steps leaves AdamW's upper moments zero, and there is no weight decay: an upper step
            changes no bit of such a parameter.
        surgery: Whether the suppression gradient first loses what runs against the lower loss's gradient.
        micro: Images of the concept batch that are computed at once; the batch is a multiple of it. None: all of them.
            The lower loss takes the parts in which the lower level has asked the teacher.
        rule: How both gradients become one; that of the eraser goes before it. None: by lambda.
        pull: A term of the weights alone, for erasers that have none of their own.
        envelope: Of the lower loss, which is taken off the penalty.
    """

    def __init__(
        self,
        lower: FineTuning,
        eraser: Eraser,
        penalty: float | Tensor | Callable[[], Tensor],
        penalty_norm: PenaltyNorm,
        hold: Callable[[], object] = lambda: None,
        surgery: bool = False,
        micro: int | None = None,
        rule: Rule | None = None,
        pull: Pull | None = None,
        envelope: Envelope | None = None,
    ):
        self.lower, self.eraser, self.flat, self.penalty = lower, eraser, lower.flat, penalty
        self.penalty_norm: PenaltyNorm = penalty_norm
        self.own, self.pull, self.envelope = rule, eraser.pull or pull, envelope
        self.surgery, self._hold, self.micro = surgery, hold, micro
        lower.answers.keeps |= self.asks_lower

    def __call__(self, batch: Batch) -> Loss:
        lower, eraser = self.lower, self.eraser
        if self.envelope:
            self.envelope.follow()
        parts = batch.split(self.micro or len(batch.latents))
        losses = (eraser.loss(lower.student, lower.answers, part) for part in parts)
        loss = self._descend(losses, len(parts))
        if self.pull is not None:
            with phase("losses"):
                term = self.pull(self.flat)
            self._hold()
            eraser.hold()
            loss = Loss(loss.total + term, {**loss.terms, "weights_held": term})
        if not self.asks_lower:
            return loss
        last = lower.answers.last
        assert last, "an upper step follows a lower step"
        penalties = (lower.loss(answered) for answered in last)
        # a rule's weights change from step to step: what is shown is the plain sum
        weight, shown = 1.0 if self.rule else self.penalty, dict[str, Tensor]()
        if callable(weight):
            shown["lambda"] = weight = weight()
        if self.penalty_norm == "raw" and not self.surgery and not self.rule and not isinstance(weight, Tensor):
            penalty = self._descend(penalties, len(last), weight, add=True)
        else:
            with phase("losses"):
                suppression = self.flat.gradient.clone()
            penalty = self._descend(penalties, len(last))
            with phase("losses"):
                if self.rule:
                    self.rule(suppression, self.flat)
                else:
                    self.add(suppression, self.flat, weight)
        with phase("losses"):
            total = loss.total + weight * penalty.total
        return Loss(total, {**loss.terms, "penalty": penalty.total, **shown})

    @property
    def rule(self) -> Rule | None:
        return self.eraser.rule or self.own

    @property
    def asks_lower(self) -> bool:
        """Whether the lower loss has a part in the gradient."""
        moves = isinstance(self.penalty, Tensor) or callable(self.penalty)
        return moves or bool(self.penalty) or self.surgery or self.rule is not None

    def _descend(self, parts: Iterable[Loss], count: int, weight: float = 1.0, add: bool = False) -> Loss:
        loss = descend(parts, count, self.flat, weight, add)
        self._hold()
        self.eraser.hold()
        return loss

    def add(self, suppression: Tensor, flat: FlatParameters, weight: float | Tensor) -> None:
        """Add lambda times the penalty's gradient, scaled to the norm of the suppression gradient if so asked.

        Adam forgets the scale of a gradient but not its direction: lambda = 100 on the raw one leaves nothing of the
        suppression.
        """
        if self.envelope:
            self.envelope.take_off(flat)
            self._hold()
            self.eraser.hold()
        if self.surgery:
            project(suppression, flat.gradient, flat.dot)
        if self.penalty_norm == "grad":
            weight = weight * flat.norm(suppression) / flat.norm()
        if isinstance(weight, Tensor):
            torch.addcmul(suppression, flat.gradient, weight.to(flat.gradient.dtype), out=flat.gradient)
        else:
            torch.add(suppression, flat.gradient, alpha=weight, out=flat.gradient)


def project(gradient: Tensor, other: Tensor, dot: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Take out of `gradient`, in place, what runs against `other`, both (m,): PCGrad (arXiv:2001.06782, algorithm 1).

        g <- g - min(0, <g, r>) / |r|^2 r

    Only the suppression gradient is projected, not the lower loss's as well: it is suppression that must not undo the
    lower level. Nothing is read back from the device.
    """
    against = dot(gradient, other).clamp(max=0) / dot(other, other).clamp(min=torch.finfo(torch.float32).tiny)
    gradient.addcmul_(other, -against.to(gradient.dtype))
