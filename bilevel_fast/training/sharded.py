"""Flat parameters whose batch is shared by several ranks, each of which keeps some rows of what is trained (ZeRO-1).

    master, average, gradient   (m,)  fp32       this rank's rows, and so the moments; m is N / ranks, rounded up
    compute                     (N,)  as dtype   all of it, as every rank's network computes
    local                       (N,)             what backward of this rank's own leaf has found

    collect    gradients of a leaf -> `local`
    take       after the last leaf: everybody's `local` for this rank's rows -> `gradient`, their sum
    publish    after a step: everybody's rows -> `compute`

arXiv:1910.02054, its first stage. With several leaves on one rank alone it is the same, with all rows on it. Sums,
norms and products are over rows and leaves in one order (`scale.rows`): the bits do not know how many ranks there are.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_fast.scale.rows import ROW, Counter, buckets, pieces, tree
from bilevel_fast.scale.settings import Reduction
from bilevel_fast.scale.team import Team
from bilevel_fast.training.parameters import CHUNK, FlatParameters

assert CHUNK == ROW, "norms are over rows"


class ShardedParameters(FlatParameters):
    """`FlatParameters` of one rank of a team. What it says of buffers (N,) holds here, too, with padding at the end.

    Args:
        module, dtype, average: As there.
        summed: Whether a leaf is several backward passes.
        team: The ranks. All make the same calls in the same order; most of them are collective.
        leaves: Equal parts of a batch, of all ranks together.
        reduction: See `scale.settings.Scale`.
    """

    copies = True

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype = torch.float32,
        average: bool = False,
        summed: bool = False,
        *,
        team: Team,
        leaves: int,
        reduction: Reduction = "tree",
    ):
        self.size, device = self._lay_out(module, dtype), next(module.parameters()).device
        self.team, self.reduction, self.ranks = team, reduction, team.world
        self.leaves = len(team.ranks.leaves(leaves))
        self._counter, self._cut = Counter(self.leaves), buckets(self.size, team.world)
        size, rows = (sum(n * bucket.size for bucket in self._cut) for n in (team.world, 1))
        self.compute = torch.zeros(size, dtype=dtype, device=device)
        self.master, self.gradient = (torch.zeros(rows, device=device) for _ in range(2))
        views = self.views(self.compute)
        for name, p in module.named_parameters():
            views[name].copy_(p.detach())
            self._put(self.master, name, p.detach(), 0)
        self.average = self.master.clone() if average else None
        self.rows = self.master if dtype == torch.float32 else self.master.to(dtype)
        self.local = torch.zeros(size, dtype=torch.float32 if summed else dtype, device=device)
        self._point_at(self.compute)
        self._taken = [(module.get_parameter(name), view) for name, view in self.views(self.local).items()]
        # where the rows of (N,) are in everybody's rows, one rank's after the other
        place = torch.arange(team.world * rows // ROW, device=device).view(team.world, -1)
        runs = [place[:, b.mine // ROW : (b.mine + b.size) // ROW].reshape(-1) for b in self._cut]
        self._places = torch.cat(runs)[: self.size // ROW]

    def place(self) -> None:
        """Nothing: a gradient goes over the network before anybody reads it."""

    def take(self, part: int, parts: int, add: bool) -> None:
        """`parts` and `part` are of this rank. Collective with the last of them."""
        each = parts // self.leaves
        assert each * self.leaves == parts, "a leaf consists of whole parts"
        self.collect(part % each > 0)
        if (part + 1) % each:
            return
        total = self._counter.add(self.local)
        if part + 1 == parts:
            assert total is not None
            for bucket in self._cut:
                own = bucket.own(self.gradient)
                found = self._reduced(bucket.whole(total))
                if add:
                    own.add_(found)
                else:
                    own.copy_(found)

    def _reduced(self, x: Tensor) -> Tensor:
        """Of a bucket: the sum of everybody's `x`, (world n,), for this rank's run, (n,)."""
        if self.reduction == "ring":
            out = x.new_empty(len(x) // self.ranks)
            self.team.add_up(out, x)
            return out
        came = torch.empty_like(x)
        self.team.exchange(came, x)
        return tree(came.chunk(self.ranks))

    def everywhere(self, numbers: Tensor) -> Tensor:
        out = numbers.new_empty(self.ranks * len(numbers), *numbers.shape[1:])
        self.team.gather(out.view(-1), numbers.contiguous().view(-1))
        return out

    def norm(self, buffer: Tensor | None = None) -> Tensor:
        found = self.gradient if buffer is None else buffer
        rows = torch.linalg.vector_norm(found.view(-1, ROW), dim=1, dtype=torch.float32)
        return torch.linalg.vector_norm(self._in_order(rows))

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """By rows, as `norm`; elsewhere it is by larger parts."""
        return self._in_order((a * b).view(-1, ROW).sum(1)).sum()

    def _in_order(self, rows: Tensor) -> Tensor:
        """A number (m / ROW,) of each of this rank's rows -> (N / ROW,) of all, without padding."""
        return self.everywhere(rows)[self._places]

    def gathered(self, buffer: Tensor) -> Tensor:
        return self._all_rows(buffer)[: self.size]

    def own(self, whole: Tensor) -> Tensor:
        out = whole.new_zeros(len(self.master))
        for piece in pieces(self._cut, self.team.rank, 0, self.size):
            out[piece.mine : piece.mine + piece.length] = whole[piece.after : piece.after + piece.length]
        return out

    def gradients(self, names: Collection[str]) -> list[Tensor]:
        return [self.gradient[a:b] for name in names for a, b in self._mine(name)]

    def publish(self) -> None:
        for bucket in self._cut:
            self.team.gather(bucket.whole(self.compute), bucket.own(self.rows))

    @contextmanager
    def whole(self) -> Iterator[list[Tensor]]:
        """Copies of all rows on every rank meanwhile; afterwards each takes back its own."""
        kept = [self.master] if self.average is None else [self.master, self.average]
        found = [self._all_rows(rows) for rows in kept]
        yield found
        for rows, whole in zip(kept, found, strict=True):
            for bucket in self._cut:
                bucket.own(rows).copy_(bucket.run(whole, self.team.rank))
        self._republish()

    def state_dict(self, buffer: Tensor | None = None) -> dict[str, Tensor]:
        """Of a buffer (m,): a copy of all rows, on the host of rank 0; empty on the other ranks. Collective."""
        buffer = self.master if buffer is None else buffer
        whole = torch.empty(self.compute.shape if self.team.rank == 0 else 0, dtype=buffer.dtype)
        for bucket in self._cut:
            came = buffer.new_empty(self.ranks * bucket.size)
            self.team.gather(came, bucket.own(buffer))
            if self.team.rank == 0:
                bucket.whole(whole).copy_(came)
        if self.team.rank:
            return {}
        return self._state_of(whole)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], buffer: Tensor | None = None) -> None:
        """Each rank fills its rows from all there are."""
        self._check_fits(state)
        for name, place in self._state_of(self.compute).items():
            if name in self._layouts:
                inside = int(place.storage_offset() - self.compute.storage_offset()) - self._layouts[name][0]
                rows = self.master if buffer is None else buffer
                self._put(rows, name, state[name], inside, place.stride())
            else:
                place.copy_(state[name])
        if buffer is None:
            self._republish()

    def release(self) -> nn.Module:
        self._point_at(self._all_rows(self.master if self.average is None else self.average))
        for p in self.module.parameters():
            p.data = p.data.clone()
        return self.module

    def _republish(self) -> None:
        if self.rows is not self.master:
            self.rows.copy_(self.master)
        self.publish()

    def _all_rows(self, buffer: Tensor) -> Tensor:
        """All rows of a buffer (m,), with the padding at their end."""
        whole = buffer.new_empty(self.compute.shape)
        for bucket in self._cut:
            self.team.gather(bucket.whole(whole), bucket.own(buffer))
        return whole

    def _mine(self, name: str) -> list[tuple[int, int]]:
        """From where to where the elements of a parameter lie in this rank's rows."""
        start, shape, _ = self._layouts[name]
        found = pieces(self._cut, self.team.rank, start, shape.numel())
        return [(piece.mine, piece.mine + piece.length) for piece in found]

    def _put(
        self, buffer: Tensor, name: str, value: Tensor, inside: int, strides: tuple[int, ...] | None = None
    ) -> None:
        """Write what a buffer (m,) has of a parameter.

        Args:
            value: The parameter, or what its network says of it, which may leave out padding.
            inside: Where its first element lies in the parameter.
            strides: Of its elements in the parameter; the parameter's own if None.
        """
        start, shape, own = self._layouts[name]
        found = list(pieces(self._cut, self.team.rank, start, shape.numel()))
        if not found:
            return
        flat = torch.zeros(shape.numel(), dtype=buffer.dtype, device=value.device)
        flat.as_strided(value.shape, strides or own, inside).copy_(value)  # in the order of the buffer
        for piece in found:
            buffer[piece.mine : piece.mine + piece.length] = flat[piece.after : piece.after + piece.length]
