"""From logits to gates (arXiv:2406.12042, section 3.2): noisy while learning, certain when asked for an expert.

    width   g = sigmoid((z + n + b) / tau)                       n Gumbel noise, or 0
    depth   p = softmax(z),  c_k = p_1 + ... + p_(D - k + 1)     so 1 = c_1 >= c_2 >= ... >= c_D
            m_k = sigmoid((l(c_k) + n_k + b) / tau)              of the k-th site in `depth_order`
            l(c) = log((c + e) / (1 - c + e)), e = 1e-6          the inverse of sigmoid, finite at 0 and 1

With b = 3 nearly everything is open at the start. A width vector without any gate >= 0.5 gets 0.5 added to its first
entry: something has to stay. The cumulative sum makes depths go one after the other, the innermost first.

Legend: B samples or codes, V entries of the architecture vector, D depths.
"""

from functools import lru_cache

import torch
from torch import Tensor

from bilevel_fast.models.architecture import UNetConfig
from bilevel_fast.models.vector import layout
from bilevel_fast.ops.randomness import Indices, Stream, uniform

TEMPERATURE, BIAS = 0.4, 3.0
_LOGIT_EPS = 1e-6


@lru_cache
def depth_order(config: UNetConfig) -> tuple[int, ...]:
    """Depth numbers, that of the site which is kept longest first: (D,).

    From the outermost level inwards; of a level first the up block's sites, the last one first, then the down block's
    in the order of execution.
    """
    depths = layout(config).depths

    def rank(i: int) -> tuple[int, int, int]:
        up = depths[i].name.startswith("up")
        return depths[i].stride, 0 if up else 1, -i if up else i

    return tuple(sorted(range(len(depths)), key=rank))


def gumbel(config: UNetConfig, seed: int, indices: Indices) -> Tensor:
    """Gumbel noise for the gates, (B, V) fp32 on the CPU: one row per index, a pure function of it and the seed."""
    u = uniform(seed, Stream.GATE, indices, (layout(config).size,)).double() + 2.0**-25  # from [0, 1) into (0, 1)
    return (-(-u.log()).log()).float()


def binarise(config: UNetConfig, logits: Tensor, noise: Tensor | None = None) -> Tensor:
    """G(z): soft gates in [0, 1], (B, V), differentiable.

    Args:
        config: The dense UNet.
        logits: (B, V).
        noise: (B, V) from `gumbel`. None to be certain: gates then depend on their own row of logits alone.

    Raises:
        ValueError: The logits have another shape.
    """
    noise = torch.zeros_like(logits) if noise is None else noise.to(logits)
    widths, depths = layout(config).split(logits)
    width_noise, depth_noise = layout(config).split(noise)
    gates = [_open_one(_relax(z + n)) for z, n in zip(widths, width_noise, strict=True)]
    kept = depths.softmax(dim=1).cumsum(dim=1).flip(1)
    order = torch.tensor(depth_order(config), device=logits.device)
    kept = kept.clamp(max=1.0)  # a sum of rounded numbers may be a little more
    in_order = _relax(((kept + _LOGIT_EPS) / (1.0 - kept + _LOGIT_EPS)).log() + depth_noise)
    return torch.cat([*gates, torch.zeros_like(in_order).index_copy(1, order, in_order)], dim=1)


def harden(gates: Tensor) -> Tensor:
    """1 where a gate is >= 0.5, else 0; the gradient goes straight through, as if nothing had been rounded."""
    return (gates >= 0.5).to(gates.dtype) + (gates - gates.detach())


def _relax(z: Tensor) -> Tensor:
    return torch.sigmoid((z + BIAS) / TEMPERATURE)


def _open_one(gates: Tensor) -> Tensor:
    closed = (gates < 0.5).all(dim=1, keepdim=True)
    first = torch.zeros_like(gates)
    first[:, 0] = 0.5
    return gates + closed * first
