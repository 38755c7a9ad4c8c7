"""The loss of the router, and what gates cost (arXiv:2406.12042, section 3.3).

    L = L_diff + 0.2 L_out + 0.2 L_feat                     of the gated network, against the same one with open gates
      + 2   R,   R = |log(mean_b r_b / p')|                 MACs: r_b the prunable share that sample b keeps
      + 100 C,   C = mean BCE(softmax_j(cos(N(a_b), N(a_j)) / 0.03), softmax_j(cos(c_b, c_j) / 0.03))
      - 0.1 std_b r_b + 0.1 (1 - max_b r_b)                 experts of different sizes, one of them large

With `per_expert` every sample's gates are held to the budget, not their mean: R = mean_b |log(r_b / p')|, and the last
line, which pulls experts apart in size, is left out.

p' is the prunable share at which the whole UNet has the wanted share of its MACs. MACs are the `true` ones of
`macs.count`; the authors count by `official` rules.

Legend: B samples, V entries of the architecture vector, D width of the prompt embedding.
"""

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import UNetConfig
from bilevel_fast.models.diffusion import Noised
from bilevel_fast.models.macs import dense_true, site_costs
from bilevel_fast.models.unet import Prediction
from bilevel_fast.models.vector import layout
from bilevel_fast.pruning.aptp.binarise import harden
from bilevel_fast.pruning.aptp.router import cosines
from bilevel_fast.training.losses import Loss, LossWeights, fine_tuning_loss

SHARPNESS = 0.03
"""Temperature of both softmaxes of the contrastive loss."""


@dataclass(frozen=True)
class RouterWeights:
    """Weights of the terms, named as in `Loss.terms`. The defaults are APTP's.

    Raises:
        UserError: The first three are all zero, or one is negative.
    """

    diffusion: float = 1.0
    output: float = 0.2
    feature: float = 0.2
    resource: float = 2.0
    contrastive: float = 100.0
    spread: float = 0.1
    largest: float = 0.1

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if not weight >= 0:
                raise UserError(f"weight of the {name} loss is {weight}, wanted 0 or more")
        _ = self.task

    @property
    def task(self) -> LossWeights:
        return LossWeights(self.diffusion, self.output, self.feature)


class GatePrices:
    """The cost of gates, in MACs of one sample: linear in every gate, and for hard gates what `macs.count` says.

    Args:
        config: The dense UNet.
        latent, text: Sizes to count at, as in `macs.count`.

    Attributes:
        dense: MACs with all gates open.
        prunable: MACs that gates can save.
    """

    def __init__(self, config: UNetConfig, latent: int, text: int):
        plan, table = layout(config), site_costs(config, latent, text)
        self.plan, self.dense = plan, dense_true(config, latent, text)
        units = [table[s.site.name].units[s.width.name].true for s in plan.segments for _ in range(s.width.units)]
        fixed = [table[site.name].fixed.true for site in plan.depths]
        self._units = torch.tensor(units, dtype=torch.float64, device="cpu")
        self._fixed = torch.tensor(fixed, dtype=torch.float64, device="cpu")
        self.prunable = sum(units) + sum(fixed)

    def macs(self, gates: Tensor) -> Tensor:
        """MACs behind gates (B, V): (B,) fp64, differentiable. Exact for hard gates: integers below 2^53."""
        return self.share(gates) * self.prunable + (self.dense - self.prunable)

    def share(self, gates: Tensor) -> Tensor:
        """The prunable share r that gates (B, V) keep: (B,) fp64, differentiable."""
        gates = gates.double()
        widths, depths = gates[:, : self.plan.widths], gates[:, self.plan.widths :]
        kept = (widths * self.plan.stretch(depths)) @ self._units.to(gates.device)
        return (kept + self.plan.standing(depths) @ self._fixed.to(gates.device)) / self.prunable

    def target(self, ratio: float) -> float:
        """p': the prunable share at which `ratio` of the dense MACs are kept.

        Raises:
            UserError: That many are not prunable, or the ratio exceeds 1.
        """
        wanted = 1.0 - (1.0 - ratio) * self.dense / self.prunable
        if not 0.0 < wanted <= 1.0:
            least = 1.0 - self.prunable / self.dense
            raise UserError(f"budget is {ratio:g}, wanted {least:.3f} < budget <= 1: no gate saves the rest")
        return wanted


def resource_loss(share: Tensor, target: float, per_expert: bool = False) -> Tensor:
    """R of shares (B,): 0 where their mean, or each of them, is the target; as much for half of it as for twice. ()"""
    return ((share if per_expert else share.mean()) / target).log().abs().mean()


def contrastive_loss(architectures: Tensor, prompts: Tensor) -> Tensor:
    """C: prompts that are alike should want architectures that are alike. ()

    Args:
        architectures: (B, V) in the similarity space; receives the gradient.
        prompts: (B, D) embeddings.
    """
    # fp64: a probability this sharp is 1 in fp32, and 1 - p has no logarithm
    ours = (cosines(architectures, architectures).double() / SHARPNESS).softmax(dim=1)
    theirs = (cosines(prompts, prompts).double() / SHARPNESS).softmax(dim=1)
    return F.binary_cross_entropy(ours, theirs.detach())


def router_loss(
    student: Prediction,
    teacher: Prediction,
    noised: Noised,
    gates: Tensor,
    architectures: Tensor,
    prompts: Tensor,
    prices: GatePrices,
    target: float,
    weights: RouterWeights,
    per_expert: bool = False,
) -> Loss:
    """L and its terms.

    Args:
        student: Of the gated network.
        teacher: Of the network with open gates, without gradient.
        noised: Target and SNR weight of each sample.
        gates: (B, V) soft gates that the student ran behind; counted as if hard, with gradients straight through.
        architectures: (B, V) in the similarity space, of the predictor's own gates.
        prompts: (B, D) embeddings.
        prices: Of the gates.
        target: p', from `GatePrices.target`.
        weights: Of the terms. One of weight 0 is still measured.
        per_expert: Every expert is held to the budget; see above.
    """
    task = fine_tuning_loss(student, teacher, noised, weights.task)
    share = prices.share(harden(gates))
    std = share.std(correction=min(1, len(share) - 1))
    terms = {
        "resource": resource_loss(share, target, per_expert),
        "contrastive": contrastive_loss(architectures, prompts),
        "spread": -std,
        "largest": 1.0 - share.max(),
    }
    wanted = replace(weights, spread=0.0, largest=0.0) if per_expert else weights
    total = task.total + sum(getattr(wanted, name) * term for name, term in terms.items())
    terms = {name: term.detach().float() for name, term in terms.items()}
    return Loss(
        total.float(), {**task.terms, **terms, "macs": (prices.macs(harden(gates)).mean() / prices.dense).detach()}
    )
