"""How the upper step makes one direction of two gradients, where that is not a constant lambda.

With one set of parameters, equation 9 of arXiv:2412.15341 is *simple* bilevel optimisation: descend L_CU among the
points where L_ft is least. With g = grad L_CU and r = grad L_ft, both at theta, its solvers differ in the weight of r:

    penalty     d = g + lambda_k r               a penalty on the value function gap, whose gradient is r
      constant    lambda_k = lambda
      rising      lambda (k + 1)^(1/4)           grows without end, as F2SA's (arXiv:2301.10945) does
      linear      lambda min(10, (k + 1) / 10)   min(max, l0 + k s), from a tenth of lambda to ten times it
                                                 (penalty-based bilevel gradient descent, arXiv:2302.05185)
      falling     lambda (1 + (k + 1)^(-1/7) / 10)
    ewc         d = g + 2 lambda F (theta - theta*)   in place of r: see erasing.amnesia (arXiv:2305.10120); no pass of
                                                 the student
    meha        d = g + lambda_k (r - gamma (theta - v))    lambda_k rising; v takes steps of its own on the lower loss,
                                                 tied to theta: see training.envelope (arXiv:2405.09927)
    bome        d = g + max(0, eta - <g, r> / |r|^2) r      eta = 0.5 (arXiv:2209.08709): the direction nearest to g
                                                 along which L_ft falls by eta |r|^2 at least; no lambda

k counts upper steps from 0. Papers also divide d by max(1, lambda): AdamW forgets the length of d, so that is left out.
"""

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.settings import Upper
from bilevel_fast.training.envelope import Envelope
from bilevel_fast.training.lower import FineTuning
from bilevel_fast.training.parameters import FlatParameters
from bilevel_fast.training.upper import Rule

BARRIER = 0.5
"""Eta of BOME."""


def rule_of(upper: Upper) -> Rule | None:
    """What takes the place of the penalty; None where nothing does."""
    return bome if upper.solver == "bome" else None


def envelope_of(upper: Upper, lower: FineTuning) -> Envelope | None:
    """What is taken off the penalty; None where nothing is."""
    return Envelope(lower, upper.meha.rate, upper.meha.gamma) if upper.solver == "meha" else None


def schedule_of(upper: Upper) -> str:
    """How lambda goes on, as `weight_at` takes it."""
    return "rising" if upper.solver == "meha" else upper.penalty_schedule


def bome(suppression: Tensor, flat: FlatParameters) -> None:
    """d = g + max(0, eta - <g, r> / |r|^2) r, with g (m,) and r in `flat.gradient`, which then holds d.

    Nothing is read back from the device; where r is zero, d is g.
    """
    square = flat.dot(flat.gradient, flat.gradient).clamp(min=torch.finfo(torch.float32).tiny)
    factor = (BARRIER - flat.dot(suppression, flat.gradient) / square).clamp(min=0)
    torch.addcmul(suppression, flat.gradient, factor.to(flat.gradient.dtype), out=flat.gradient)


def weight_at(schedule: str, penalty: float, step: Tensor) -> Tensor:
    """lambda_k, () fp32, of upper step k: a number on the device, where a CUDA graph sees it move."""
    k = step + 1
    growth = {
        "rising": lambda: k**0.25,
        "linear": lambda: (k / 10).clamp(max=10),
        "falling": lambda: 1 + 0.1 * k ** (-1 / 7),
    }
    return penalty * growth[schedule]()


def check(upper: Upper, default: Upper, ruled: bool, remembers: bool = False) -> None:
    """Refuse settings that no solver, or two of them, would read.

    Args:
        default: What the settings are where nobody gives them.
        ruled: Whether the eraser weighs the two gradients by a rule of its own.
        remembers: Whether it holds the weights to what they were already.

    Raises:
        UserError: Names the flags.
    """
    moves = upper.penalty_schedule != "constant"
    own = {"--upper.surgery": upper.surgery, f"--upper.solver {upper.solver}": upper.solver != "penalty"}
    own[f"--upper.penalty-schedule {upper.penalty_schedule}"] = moves
    given = [flag for flag, on in own.items() if on]
    if ruled and given:
        raise UserError(
            f"{given[0]} given with eraser {upper.eraser!r}, which weighs the two gradients by its own rule"
        )
    if upper.solver == "bome":
        unread = [flag for flag in given if "solver" not in flag]
        unread += [f"--upper.penalty {upper.penalty:g}"] * (upper.penalty != default.penalty)
        unread += [f"--upper.penalty-norm {upper.penalty_norm}"] * (upper.penalty_norm != default.penalty_norm)
        unread += ["--upper.controller.enabled"] * upper.controller.enabled
        if unread:
            raise UserError(f"{unread[0]} given with --upper.solver bome, which has no lambda and reads only gradients")
    if upper.solver == "meha":
        unread = [flag for flag in given if "solver" not in flag]
        unread += ["--upper.controller.enabled"] * upper.controller.enabled + ["--upper.penalty 0"] * (
            not upper.penalty
        )
        if unread:
            raise UserError(f"{unread[0]} given with --upper.solver meha, whose lambda rises from --upper.penalty")
    elif upper.meha != default.meha:
        raise UserError(f"--upper.meha given with --upper.solver {upper.solver}, which does not read it; wanted meha")
    if upper.solver == "ewc":
        if remembers:
            raise UserError(f"--upper.solver ewc given with eraser {upper.eraser!r}, which holds the weights already")
        unread = [flag for flag in given if "solver" not in flag]
        unread += [f"--upper.penalty-norm {upper.penalty_norm}"] * (upper.penalty_norm != default.penalty_norm)
        unread += ["--upper.controller.enabled"] * upper.controller.enabled
        if unread:
            raise UserError(f"{unread[0]} given with --upper.solver ewc, which asks for no gradient of the lower loss")
    if moves and (upper.controller.enabled or not upper.penalty):
        other = "--upper.controller.enabled, which chooses lambda" if upper.controller.enabled else "--upper.penalty 0"
        raise UserError(f"--upper.penalty-schedule {upper.penalty_schedule} given with {other}")
