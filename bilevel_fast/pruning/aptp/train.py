"""Training APTP's router: the UNet stays as it is, predictor and codes learn (arXiv:2406.12042, section 3).

    step < pretrain    every sample runs behind the gates that the predictor asks for: it feels all losses
    afterwards         every sample runs behind the code it was given: codes feel the task and the MACs, the predictor
                       the contrastive loss alone

Noise, timesteps and gates are drawn by a sample's global index and the step: a run that starts in the middle from its
state is the same run.

Legend: B samples, L text tokens, D width of the prompt embedding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import Batch
from bilevel_fast.models.conditioning import unpack
from bilevel_fast.models.diffusion import Schedule, noise
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning.aptp.gates import ResNetGate, gated
from bilevel_fast.pruning.aptp.losses import GatePrices, RouterWeights, router_loss
from bilevel_fast.pruning.aptp.router import Router, embed
from bilevel_fast.pruning.budget import MacBudget
from bilevel_fast.training.optim import LevelOptimizer
from bilevel_fast.training.parameters import FlatParameters


@dataclass(frozen=True)
class RouterConfig:
    """How the router is trained. The defaults are APTP's, but for `resnet` and `per_expert`.

    Raises:
        UserError: A number is out of range.
    """

    experts: int = 8
    steps: int = 5000
    pretrain: int = 500
    """First steps, in which the predictor's own gates drive the network."""
    lr: float = 2e-4
    """Times the square root of the batch size."""
    warmup: int = 100
    """Steps until the learning rate is reached, linearly."""
    resnet: ResNetGate = "exact"
    """Where the gates of ResNets lie. APTP's own are `compat`."""
    per_expert: bool = True
    """Hold every expert to the budget. APTP's own hold the mean to it, over the prompts of a batch."""
    weights: RouterWeights = field(default_factory=RouterWeights)
    snr_gamma: float | None = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("experts", 1), ("steps", 1), ("pretrain", 0), ("warmup", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}, wanted at least {least}")
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr is {self.lr}, wanted a positive number")


class RouterTraining:
    """A router on its way.

    Args:
        teacher: The dense UNet, on its device. It is frozen: its parameters no longer want gradients.
        schedule: Of the noise.
        budget: MACs of each expert, or of the prompts of a batch on average; `min_keep` is not looked at.
        width: D.
        batch_size: B, for the learning rate.
        config: The rest.

    Attributes:
        flat, optimizer: Its parameters, and what moves them: with `step`, all that the next steps follow from.
        step: Number of the next step.

    Raises:
        UserError: The budget is out of reach of the gates.
    """

    def __init__(
        self, teacher: UNet, schedule: Schedule, budget: MacBudget, width: int, batch_size: int, config: RouterConfig
    ):
        self.device = teacher.conv_in.weight.device
        self.teacher, self.config = teacher.eval().requires_grad_(False), config
        self.schedule = schedule.to(self.device)
        self.prices = GatePrices(teacher.config, budget.latent, budget.text)
        self.target = self.prices.target(budget.ratio)
        self.router = Router(teacher.config, width, config.experts, config.seed).to(self.device)
        self.flat = FlatParameters(self.router)
        self.optimizer = LevelOptimizer(self.flat, config.lr * math.sqrt(batch_size), config.warmup)
        self.step = 0

    def advance(self, batch: Batch, prompts: Tensor) -> dict[str, Tensor]:
        """One step; returns the loss and its terms, scalars on the device, without waiting for it.

        Args:
            batch: Latents, text states and global indices; noise and timesteps are drawn if they are not there.
            prompts: (B, D) embeddings of the captions.
        """
        drawn = batch.drawn(self.config.seed, self.schedule.num_train_timesteps)
        assert drawn.eps is not None
        assert drawn.t is not None
        latents, text, eps, t, prompts = (
            x.to(self.device) for x in (drawn.latents, drawn.text, drawn.eps, drawn.t, prompts.float())
        )
        noised = noise(self.schedule, latents, eps, t, self.config.snr_gamma)
        routed = self.router(prompts, batch.index, self.step)
        gates = routed.own if self.step < self.config.pretrain else routed.gates
        with torch.no_grad():
            teacher = self.teacher(noised.x, t, text)
        student = gated(self.teacher, noised.x, t, text, gates, self.config.resnet)
        architectures = embed(self.teacher.config, routed.own)
        weights, each = self.config.weights, self.config.per_expert
        loss = router_loss(
            student, teacher, noised, gates, architectures, prompts, self.prices, self.target, weights, each
        )
        loss.total.backward()
        self.flat.collect()
        norm = self.optimizer.step()
        self.step += 1
        return {**loss.terms, "loss": loss.total.detach(), "grad_norm": norm}


def mean_pool(batch: Batch, pooled: int = 0) -> Tensor:
    """Prompt embeddings from the text states themselves, where there is no encoder for prompts: (B, D), D as theirs.

    `pooled` is the `pooled_dim` of the UNet: what lies behind the states is no state.
    """
    return (unpack(batch.text, pooled)[0] if pooled else batch.text).float().mean(dim=1)


def train(
    teacher: UNet,
    schedule: Schedule,
    batches: Callable[[int], Batch],
    budget: MacBudget,
    config: RouterConfig,
    prompts: Callable[[Batch], Tensor] | None = None,
    watch: Callable[[int, dict[str, Tensor]], None] = lambda step, terms: None,
) -> Router:
    """Train a router on the teacher.

    Args:
        teacher, schedule, budget: As `RouterTraining`.
        batches: The batch of a step, of the same size at every step.
        config: Steps and the rest.
        prompts: Embeds the captions of a batch: (B, D). By default `mean_pool`.
        watch: Called after every step with its number and what `advance` returned.

    Returns:
        The router, with parameters of its own, without gradients.

    Raises:
        UserError: As `RouterTraining`; or the last gradient was not finite.
    """
    prompts, first = prompts or partial(mean_pool, pooled=teacher.config.pooled_dim), batches(0)
    training = RouterTraining(teacher, schedule, budget, prompts(first).shape[1], len(first.index), config)
    for step in range(config.steps):
        batch = batches(step)
        watch(step, training.advance(batch, prompts(batch)))
    if bad := int(training.optimizer.bad_in_a_row):
        raise UserError(f"teacher: the gradient of its gates is not finite, {bad} of {config.steps} steps in a row")
    training.flat.release()
    return training.router.requires_grad_(False)
