"""Work in portions that ranks share: rank r does every W-th from the r-th on, and all get all results, in their order.

A portion is the same whoever does it, so its result is, too, whatever W is.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bilevel_fast.scale.team import Team


def joined(team: Team, sizes: Sequence[int], mine: Iterator[Tensor]) -> Iterator[Tensor]:
    """The results of all portions, on the CPU, on all ranks. Collective: all ranks ask for each of them.

    Args:
        sizes: Rows of each portion's result.
        mine: Results of this rank's portions, `team.ranks.share` of all: (n, ...) each, alike but for n, on any device.
    """
    if team.world == 1:
        yield from (rows.cpu() for rows in mine)
        return
    kind: tuple[torch.dtype, list[int]] | None = None
    for start in range(0, len(sizes), team.world):  # a round: each rank has one of these, or none
        there = sizes[start : start + team.world]
        own = next(mine).cpu() if team.rank < len(there) else None
        if kind is None:
            kind = _kind(team, own)
        dtype, shape = kind
        sent = torch.zeros(max(there), *shape, dtype=dtype)
        if own is not None:
            sent[: len(own)] = own
        came = torch.empty(team.world, *sent.shape, dtype=dtype)
        team.gather(came.flatten(), sent.flatten()).wait()
        yield from (rows[:size] for rows, size in zip(came, there, strict=False))


def _kind(team: Team, own: Tensor | None) -> tuple[torch.dtype, list[int]]:
    """Dtype of a row, and its shape, as the first rank has them, which has a portion if anybody has."""

    def said() -> list[object]:
        assert own is not None
        return [str(own.dtype).removeprefix("torch."), list(own.shape[1:])]

    name, shape = team.first(said)
    return getattr(torch, str(name)), list(shape)  # pyright: ignore[reportArgumentType, reportCallIssue]
