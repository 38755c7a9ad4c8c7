"""The insides of SD 2.1's sites for rows of four experts, which `bilevel_fast.pruning.aptp.mixed_ops` runs in two ways.

Feed-forwards and self-attention at 512 px; `torch` gathers each expert's weights, `triton` reads a list for each row.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case, Provider
from bilevel_fast.models.layers import Attention, FeedForward
from bilevel_fast.ops.providers import ops
from bilevel_fast.pruning.aptp import mixed_ops
from bilevel_kernels.kept import Kept, counts

LEVELS = ((320, 4096, 5), (640, 1024, 10), (1280, 256, 20), (1280, 64, 20))  # channels, tokens, heads
GROUPS, EXPERTS = 32, 4


def _kept(units: int, ratio: float, batch: int) -> Kept:
    """Rows sorted by expert, each of which keeps other units; the same ones every time."""
    choose, count = random.Random(0), max(1, int(ratio * units))
    lists = [sorted(choose.sample(range(units), count)) for _ in range(EXPERTS)]
    return Kept.per_sample(units, [lists[row * EXPERTS // batch] for row in range(batch)])


def cases(batch: int, device: torch.device, dtype: torch.dtype) -> list[Case]:
    found = []
    for channels, tokens, heads in LEVELS:
        x = batch * tokens * channels
        for ratio in (0.80, 0.55):
            for name, make, units, flops in _sites(channels, tokens, heads):
                kept = _kept(units, ratio, batch)
                share = sum(counts(kept, units, batch)) / (batch * units)
                providers: dict[str, Provider] = {
                    which: _provider(which, make, kept, (batch, tokens, channels), device, dtype)
                    for which in ("triton", "torch")
                }
                label = f"{name} {channels}x{tokens} b{batch} {ratio:.2f}"
                moved = 2 * x * dtype.itemsize  # the rest can stay on the chip
                found.append(Case("mixture", label, providers, moved, int(flops * share * batch), x))
    return found


Site = Callable[[], Callable[[Tensor, Kept], Tensor]]


def _sites(channels: int, tokens: int, heads: int) -> list[tuple[str, Site, int, int]]:
    """Name, what makes it, units to keep, FLOPs of a dense row."""

    def feed_forward() -> Callable[[Tensor, Kept], Tensor]:
        module = FeedForward(channels, 4 * channels)
        return lambda x, kept: mixed_ops.feed_forward(module, x, kept)

    def attention() -> Callable[[Tensor, Kept], Tensor]:
        module = Attention(channels, channels, heads, channels // heads)
        return lambda x, kept: mixed_ops.attention(module, x, x, kept)

    products = 2 * tokens * channels**2
    return [
        ("ff", feed_forward, GROUPS, 12 * products),
        ("self", attention, heads, 4 * products + 4 * tokens**2 * channels),
    ]


def _provider(
    which: str, make: Site, kept: Kept, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Provider:
    def fresh() -> Callable[[], object]:
        with device:
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                site, x = make(), torch.randn(shape)
            finally:
                torch.set_default_dtype(before)

        @torch.no_grad()
        def call() -> Tensor:
            with ops(which):
                return site(x, kept)

        return call

    return fresh
