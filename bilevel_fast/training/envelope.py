"""MEHA: the lower loss less its Moreau envelope, in place of the lower loss, in an upper step (arXiv:2405.09927).

    phi(theta) = min over v of  L_ft(v) + gamma / 2 |v - theta|^2        the envelope; grad phi = gamma (theta - v*)

L_ft(theta) = phi(theta) exactly where theta is stationary for L_ft, whether or not L_ft is convex. v* is not searched
for: v is a second copy of the weights that takes one gradient step in each upper step, on the last lower batch.

    v <- v - a (grad L_ft(v) + gamma (v - theta))
    d  = g + lambda_k (r - gamma (theta - v))          lambda_k = lambda (k + 1)^(1/4)

with g = grad L_CU(theta), r = grad L_ft(theta), and k upper steps so far. The paper writes 1 / gamma for gamma, and
d / lambda_k for d, whose length AdamW forgets. As a penalty, the bracket may be scaled to the length of g.
"""

import torch

from bilevel_fast.training.lower import FineTuning, descend
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.phases import phase


class Envelope:
    """v, and what it adds to the gradient. Nothing is read back from the device.

    Args:
        lower: L_ft, its student and the last lower batch.
        rate: a.
        gamma: Strength of the tie between v and theta.

    Attributes:
        v: (m,) fp32, as `FlatParameters.master`; the student as it was made, at first.
    """

    def __init__(self, lower: FineTuning, rate: float, gamma: float):
        self.lower, self.flat, self.rate, self.gamma = lower, lower.flat, rate, gamma
        self.v = self.flat.master.clone()

    def follow(self) -> None:
        """One step of v; costs a forward and backward pass of the student on the last lower batch.

        Overwrites `flat.gradient`. Where the gradient is not finite, v stays where it is, as weights do.
        """
        last = self.lower.answers.last
        assert last, "an upper step follows a lower step"
        with self.flat.at(self.v):
            descend(map(self.lower.loss, last), len(last), self.flat)
        with phase("optimizer"):
            finite = self.flat.norm().isfinite()
            found = torch.where(finite, self.flat.gradient, 0)
            self.v.lerp_(self.flat.master, self.rate * self.gamma * finite.float())
            self.v.add_(found, alpha=-self.rate)

    def take_off(self, flat: FlatParameters) -> None:
        """Take the envelope's gradient off `flat.gradient`, which is r before."""
        difference = flat.master - self.v
        flat.gradient.add_(difference.to(flat.gradient.dtype), alpha=-self.gamma)
