"""The architecture predictor: logits of an architecture vector from the embedding of a prompt (arXiv:2406.12042, 3.2).

Legend: B prompts, D width of the prompt embedding, V entries of the architecture vector, K codes.
"""

import torch
from torch import Tensor, nn

from bilevel_fast.architecture import UNetConfig
from bilevel_fast.pruning.aptp.layout import layout
from bilevel_fast.randomness import Stream, normal

_INITIAL_FROM = 1 << 62  # sample indices of initial values; those of the gates' noise count from 0


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


def orthogonal(rows: int, columns: int, seed: int, number: int) -> Tensor:
    """A random matrix with orthonormal rows, or columns if there are fewer: (rows, columns) fp32 on the CPU.

    Uniform over all of them (arXiv:math-ph/0609050), and a pure function of the seed and the number.
    """
    shape = (max(rows, columns), min(rows, columns))
    q, r = torch.linalg.qr(normal(seed, Stream.GATE, [_INITIAL_FROM + number], shape)[0].double())
    q = (q * r.diagonal().sign()).float()
    return q if rows >= columns else q.T
