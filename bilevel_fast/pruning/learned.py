"""One architecture for all prompts, learned through gates: APTP without its router (arXiv:2406.12042, a baseline)."""

import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import Batch
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning.aptp.experts import planned
from bilevel_fast.pruning.aptp.losses import RouterWeights
from bilevel_fast.pruning.aptp.train import RouterConfig, train
from bilevel_fast.pruning.budget import Budget, Calibration, MacBudget
from bilevel_fast.pruning.calibration import FIRST, CalibrationSet

STEPS = 200
RATE = 0.04
"""Of AdamW: open gates begin at a logit of 3, and there are 200 steps to close one."""


def learned_gates(teacher: UNet, budget: Budget, calibration: Calibration) -> Structure:
    """Learn one set of gates on the frozen teacher, by its loss and distillation, and cut at the budget.

    The batches are gone through again and again, each time with other noise and timesteps. How little stays of a width
    vector is up to the gates: `min_keep` is not looked at.

    Raises:
        UserError: The calibration set is empty, or the budget is one of time, or out of reach of the gates.
    """
    if not isinstance(budget, MacBudget):
        raise UserError("gates are learned at a price in MACs; for a budget of time take magnitude or diff-pruning")
    trials = CalibrationSet.of(calibration)
    batches = trials.loaded("gates")
    size = min(len(latents) for latents, _ in batches)

    def batch(step: int) -> Batch:
        latents, text = batches[step % len(batches)]
        first = FIRST + step * size  # noise of its own in every step
        return Batch(latents[:size], text[:size], None, torch.arange(first, first + size))

    config = RouterConfig(
        experts=1,
        steps=STEPS,
        pretrain=0,
        lr=RATE / size**0.5,
        warmup=10,
        weights=RouterWeights(contrastive=0.0),
        seed=trials.seed,
    )
    trained = [p for p in teacher.parameters() if p.requires_grad]
    try:
        router = train(teacher, trials.schedule, batch, budget, config)
    finally:
        for parameter in trained:  # the training froze them: the teacher is the caller's
            parameter.requires_grad_()
    return planned(teacher.config, router.gates(), budget)[0]
