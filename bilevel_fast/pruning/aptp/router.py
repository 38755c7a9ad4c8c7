"""The router: a predictor of architectures, a codebook of experts, and how prompts find theirs (arXiv:2406.12042, 3.2).

    predictor          one linear layer: logits of an architecture vector from the embedding e of a prompt
    similarity space   N(a) = [ s_w a_w m | 1[m >= 1/2] ]      of the width entries of a site with depth m
                              [ s_w 1[a_w >= 1/2] ]            of the others;  s_w = 1 / sqrt(units of the width vector)
    learning           O = cos(N(G(e)), N(codes)), codes shared out evenly among the batch by Sinkhorn, argmax
    afterwards         argmax_k O_k + b_k, without noise

The balance b is ours. Cosines of one code may be the largest for nearly every prompt; Sinkhorn evens that out, but over
a batch, so that a prompt's route would hang on its neighbours. What Sinkhorn adds to the cosines of a code, taken once
over all training prompts, shares them out as evenly, and each prompt by itself. With b = 0, as before `rebalance`, it
is APTP's rule.

Gradients of the task reach the code that a prompt was given, and never the predictor; the contrastive loss reaches the
predictor.

Legend: B prompts, K codes, V entries of the architecture vector, D width of the prompt embedding.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.architecture import UNetConfig
from bilevel_fast.models.vector import layout
from bilevel_fast.ops.randomness import Indices, Stream, normal
from bilevel_fast.pruning.aptp.binarise import binarise, gumbel, harden

_SHARPNESS, _ITERATIONS = 0.05, 3
_ANNEALED = tuple(_SHARPNESS * 4.0**-i for i in range(7))  # down to where a route is one code and no mixture
_SWEEPS = 200
_CODES = 1 << 32  # number of the codes' initial values among those of the predictor
_INITIAL_FROM = 1 << 62  # sample indices of initial values; those of the gates' noise count from 0
_NOISE_FROM = 1 << 61  # sample indices of the codes' noise, far from those of the prompts


class Predictor(nn.Module):
    """One linear layer for each width vector and one for the depths, each orthogonal at first, with a bias of zero.

    They are the rows of a single layer: one matrix product. 1,245,780 parameters for SD 2.1 and D = 768.

    Args:
        config: The dense UNet.
        width: D.
        seed: Of the initial weights.
    """

    def __init__(self, config: UNetConfig, width: int, seed: int):
        super().__init__()
        self.linear = nn.Linear(width, layout(config).size)
        parts = [s.width.units for s in layout(config).segments] + [len(layout(config).depths)]
        with torch.no_grad():
            weights = [orthogonal(rows, width, seed, number) for number, rows in enumerate(parts)]
            self.linear.weight.copy_(torch.cat(weights))
            self.linear.bias.zero_()

    def forward(self, prompts: Tensor) -> Tensor:
        """Embeddings (B, D) -> logits (B, V)."""
        return self.linear(prompts)


@dataclass(frozen=True, eq=False)
class Routed:
    """A batch of prompts on its way through the gates."""

    own: Tensor
    """(B, V) soft gates that the predictor asks for; gradients reach the predictor."""
    codes: Tensor
    """(K, V) soft gates of the codes; gradients reach them."""
    expert: Tensor
    """(B,) int64: the code that each prompt was given."""

    @property
    def gates(self) -> Tensor:
        """(B, V): those of the given codes."""
        return self.codes[self.expert]


class Router(nn.Module):
    """Predictor and codebook.

    Args:
        config: The dense UNet.
        width: D.
        experts: K.
        seed: Of the initial weights and of the noise.

    Raises:
        UserError: `experts` is not positive.
    """

    def __init__(self, config: UNetConfig, width: int, experts: int, seed: int):
        super().__init__()
        if experts < 1:
            raise UserError(f"experts is {experts}, wanted at least 1")
        self.config, self.seed = config, seed
        self.predictor = Predictor(config, width, seed)
        self.codes = nn.Parameter(orthogonal(experts, layout(config).size, seed, _CODES))
        self.balance: Tensor
        self.register_buffer("balance", torch.zeros(experts, dtype=torch.float64))

    def forward(self, prompts: Tensor, indices: Indices, step: int) -> Routed:
        """Give the prompts of a training batch their codes, evenly, with noise in all gates.

        Args:
            prompts: (B, D) embeddings.
            indices: (B,) global sample indices; they decide on the noise.
            step: Decides on the noise of the codes.
        """
        experts = len(self.codes)
        own = binarise(self.config, self.predictor(prompts), gumbel(self.config, self.seed, indices))
        turn = range(_NOISE_FROM + step * experts, _NOISE_FROM + (step + 1) * experts)
        codes = binarise(self.config, self.codes, gumbel(self.config, self.seed, turn))
        with torch.no_grad():
            similarity = cosines(embed(self.config, own), embed(self.config, codes))
            expert = sinkhorn(similarity).argmax(dim=1)
        return Routed(own, codes, expert)

    @torch.no_grad()
    def route(self, prompts: Tensor) -> Tensor:
        """The expert of each prompt, (B, D) -> (B,) int64: without noise, whatever else is in the batch.

        Raises:
            UserError: The embeddings have another width than those that the router was trained on.
        """
        return (self._similarity(prompts) + self.balance).argmax(dim=1)

    @torch.no_grad()
    def rebalance(self, prompts: Tensor) -> None:
        """Set the balance so that these prompts, (N, D), are shared out evenly. Training ends with it.

        Raises:
            UserError: As `route`.
        """
        self.balance.copy_(balance(self._similarity(prompts)))

    def _similarity(self, prompts: Tensor) -> Tensor:
        """(B, K) fp64, without noise."""
        if prompts.ndim != 2 or prompts.shape[1] != self.predictor.linear.in_features:
            wanted = self.predictor.linear.in_features
            raise UserError(f"prompt embeddings have shape {tuple(prompts.shape)}, this router wants (B, {wanted})")
        own = embed(self.config, binarise(self.config, self.predictor(prompts)))
        return cosines(own, embed(self.config, self.gates())).double()

    @torch.no_grad()
    def gates(self) -> Tensor:
        """(K, V): soft gates of the codes, without noise."""
        return binarise(self.config, self.codes)


def embed(config: UNetConfig, gates: Tensor) -> Tensor:
    """N(a): soft gates (B, V) into the space where architectures are compared; straight-through where it is hard."""
    plan = layout(config)
    widths, depths = gates[:, : plan.widths], gates[:, plan.widths :]
    has_depth = plan.depth_of_width.to(gates.device) < len(plan.depths)
    entries = torch.where(has_depth, widths * plan.stretch(depths), harden(widths))
    return torch.cat([entries, harden(depths)], dim=1) * plan.units.to(gates).rsqrt()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of every row of a (B, V) with every row of b (K, V): (B, K)."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def sinkhorn(similarity: Tensor) -> Tensor:
    """Share out K codes evenly among B samples: similarities (B, K) -> (B, K) fp64, every row a distribution.

    exp(O / 0.05), then three times: every code the same mass, every sample the same mass (arXiv:2006.09882).
    """
    shares = (similarity.double() / _SHARPNESS).exp()
    for _ in range(_ITERATIONS):
        shares = shares / shares.sum(dim=0) / shares.shape[1]
        shares = shares / shares.sum(dim=1, keepdim=True) / shares.shape[0]
    return shares * len(shares)


def balance(similarity: Tensor) -> Tensor:
    """b of every code, so that argmax_k O_bk + b_k gives each the same number of samples, as far as ties allow.

    The potentials of optimal transport between samples and codes (Cuturi, arXiv:1306.0895), annealed until a sample
    belongs to one code: sum_b softmax_k((O + b) / T)_bk = B / K, for T = 0.05, 0.0125, ...

    Args:
        similarity: O, (B, K).

    Returns:
        (K,) fp64; zero on average.
    """
    similarity = similarity.double()
    found = similarity.new_zeros(similarity.shape[1])
    wanted = math.log(len(similarity) / similarity.shape[1])
    for temperature in _ANNEALED:
        for _ in range(_SWEEPS):
            share = ((similarity + found) / temperature).log_softmax(dim=1).logsumexp(dim=0)
            found = found + temperature * (wanted - share)
    return found - found.mean()


def orthogonal(rows: int, columns: int, seed: int, number: int) -> Tensor:
    """A random matrix with orthonormal rows, or columns if there are fewer: (rows, columns) fp32 on the CPU.

    Uniform over all of them (arXiv:math-ph/0609050), and a pure function of the seed and the number.
    """
    shape = (max(rows, columns), min(rows, columns))
    q, r = torch.linalg.qr(normal(seed, Stream.GATE, [_INITIAL_FROM + number], shape)[0].double())
    q = (q * r.diagonal().sign()).float()
    return q if rows >= columns else q.T
