"""Flat parameters whose batch is shared by several ranks, each of which keeps some rows of what is trained (ZeRO-1).

    master, average, gradient   (m,)  fp32       this rank's rows, and so the moments; m is N / ranks, rounded up
    compute                     (N,)  as dtype   all of it, as every rank's network computes
    local                       (N,)             what backward of this rank's own leaf has found

    collect    gradients of a leaf -> `local`
    take       after the last leaf: everybody's `local` for this rank's rows -> `gradient`, their sum
    publish    before a step: everybody's rows -> `compute`, which is there when the network's next forward pass begins

The teacher is asked before the student, so weights travel meanwhile. Gradients of the last leaf are sent while its
backward pass still runs, a bucket at a time, the last one first: that is where backward begins. A bucket waits for
those behind it, whatever the order in which gradients come, so all ranks send in one order.

arXiv:1910.02054, its first stage. With several leaves on one rank alone it is the same, with all rows on it. Sums,
norms and products are over rows and leaves in one order (`scale.rows`): the bits do not know how many ranks there are.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_fast.scale.rows import ROW, Bucket, Counter, buckets, pieces, tree
from bilevel_fast.scale.settings import Reduction
from bilevel_fast.scale.team import Pending, Team
from bilevel_fast.training.parameters import CHUNK, FlatParameters
from bilevel_fast.training.units import put

assert CHUNK == ROW, "norms are over rows"

IN_FLIGHT = 2
"""Buckets that are on their way at a time: what they take in memory does not grow with the network."""


class ShardedParameters(FlatParameters):
    """`FlatParameters` of one rank of a team. What it says of buffers (N,) holds here, too, with padding at the end.

    Args:
        module, dtype, average: As there.
        summed: Whether a leaf is several backward passes.
        team: The ranks. All make the same calls in the same order; most of them are collective.
        leaves: Equal parts of a batch, of all ranks together.
        reduction: See `scale.settings.Scale`.
        device: Where the buffers are; that of the module if None.
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
        device: torch.device | None = None,
    ):
        self.team, self.reduction, self.ranks = team, reduction, team.world
        self.leaves = len(team.ranks.leaves(leaves))
        self.size, device = self._lay_out(module, dtype), device or next(module.parameters()).device
        self._counter, self._cut = Counter(self.leaves), self._buckets()
        self._whole, rows = (sum(n * bucket.size for bucket in self._cut) for n in (team.world, 1))
        self.master, self.gradient = (torch.zeros(rows, device=device) for _ in range(2))
        for name, p in module.named_parameters():
            self._put(self.master, name, p.detach(), 0)
        self.average = self.master.clone() if average else None
        self.rows = self.master if dtype == torch.float32 else self.master.to(dtype)
        self._stale, self._coming, self._heard = False, list[Pending](), list[Any]()
        self._hold(torch.float32 if summed else dtype)
        self._hear()
        # where the rows of (N,) are in everybody's rows, one rank's after the other
        place = torch.arange(team.world * rows // ROW, device=device).view(team.world, -1)
        runs = [place[:, b.mine // ROW : (b.mine + b.size) // ROW].reshape(-1) for b in self._cut]
        self._order = torch.cat(runs)[: self.size // ROW]

    def _buckets(self) -> list[Bucket]:
        return buckets(self.size, self.ranks)

    def _hold(self, dtype: torch.dtype) -> None:
        """Make what the network computes with, and what backward finds, in `dtype`."""
        self.compute = torch.zeros(self._whole, dtype=self.dtype, device=self.master.device)
        for name, view in self.views(self.compute).items():
            view.copy_(self.module.get_parameter(name).detach())
        self._point_at(self.compute)
        self._heard.append(self.module.register_forward_pre_hook(lambda *_: self.arrive()))
        self.local = torch.zeros(self._whole, dtype=dtype, device=self.master.device)
        self._taken = [(self.module.get_parameter(name), view) for name, view in self.views(self.local).items()]

    def _hear(self) -> None:
        """Be told when backward has left a parameter its gradient."""
        starts = [bucket.start for bucket in self._cut]
        ends = [start + shape.numel() for start, shape, _ in self._layouts.values()]
        # by bucket: parameters that end there. Those that go on are of one that is sent before
        places = [sum(start < end for start in starts) - 1 for end in ends]
        self._members = [[n for n, place in enumerate(places) if place == k] for k in range(len(starts))]
        self._on_way = deque[tuple[Bucket, Pending, Callable[[], Tensor]]]()
        self._rest()
        parameters = [self.module.get_parameter(name) for name in self._layouts]
        self._heard += [
            p.register_post_accumulate_grad_hook(partial(self._landed, place))
            for p, place in zip(parameters, places, strict=True)
        ]

    def _rest(self) -> None:
        """Nothing is to be sent."""
        self._ends, self._more, self._add = False, False, False
        self._next, self._awaited = len(self._cut) - 1, [len(members) for members in self._members]

    def place(self) -> None:
        """Nothing: a gradient goes over the network before anybody reads it."""

    def expect(self, part: int, parts: int, add: bool) -> None:
        each = parts // self.leaves
        assert each * self.leaves == parts, "a leaf consists of whole parts"
        self._ends, self._more, self._add = part + 1 == parts, part % each > 0, add

    def _landed(self, place: int, _: Tensor) -> None:
        if not self._ends or self.ranks == 1:
            return
        self._awaited[place] -= 1
        while self._next >= 0 and not self._awaited[self._next]:
            self._send()

    def take(self, part: int, parts: int, add: bool) -> None:
        """`parts` and `part` are of this rank. Collective with the last of them, as is the backward pass before it."""
        self.expect(part, parts, add)
        if not self._ends:
            self.collect(self._more)
            if (part + 1) % (parts // self.leaves) == 0:
                self._counter.add(self.local)
            return
        while self._next >= 0:
            self._send()
        while self._on_way:
            self._receive()
        self._counter.clear()
        self._rest()

    def _send(self) -> None:
        """Send the bucket that is next, whose gradients are there; those that never come are zero."""
        bucket = self._cut[self._next]
        x = self._found(bucket, self._members[self._next])
        if self.reduction == "ring":
            out = x.new_empty(len(x) // self.ranks)
            self._on_way.append((bucket, self.team.add_up(out, x), lambda: out))
        else:
            came = torch.empty_like(x)
            self._on_way.append((bucket, self.team.exchange(came, x), lambda: tree(came.chunk(self.ranks))))
        self._next -= 1
        if len(self._on_way) > IN_FLIGHT:
            self._receive()

    def _found(self, bucket: Bucket, ending: list[int]) -> Tensor:
        """This rank's gradient of a bucket, (world n,); `ending` are the numbers of the parameters that end there."""
        self._collect([self._taken[n] for n in ending], self._more)
        return self._counter.last(self.local, bucket.whole)

    def _receive(self) -> None:
        """Put the sum of the bucket that was sent first, for this rank's run of it, into the gradient."""
        bucket, pending, total = self._on_way.popleft()
        pending.wait()
        own = bucket.own(self.gradient)
        (own.add_ if self._add else own.copy_)(total())

    def everywhere(self, numbers: Tensor) -> Tensor:
        out = numbers.new_empty(self.ranks * len(numbers), *numbers.shape[1:])
        self.team.gather(out.view(-1), numbers.contiguous().view(-1)).wait()
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
        return self.everywhere(rows)[self._order]

    def gathered(self, buffer: Tensor) -> Tensor:
        return self._all_rows(buffer)[: self.size]

    def own(self, whole: Tensor) -> Tensor:
        out = whole.new_zeros(len(self.master))
        for piece in pieces(self._cut, self.team.rank, 0, self.size):
            out[piece.mine : piece.mine + piece.length] = whole[piece.after : piece.after + piece.length]
        return out

    def gradients(self, names: Collection[str]) -> list[Tensor]:
        return [self.gradient[a:b] for name in names for a, b in self._mine(name)]

    def moved(self) -> None:
        self._stale = True

    def publish(self) -> None:
        """Collective. Always sent: a recorded step is replayed whatever has been read before it."""
        self._wait()
        self._coming = [self.team.gather(bucket.whole(self.compute), bucket.own(self.rows)) for bucket in self._cut]
        self._stale = False

    def arrive(self) -> None:
        """Return when the network has what `rows` hold; collective where they have moved since they were published."""
        if self._stale:
            self.publish()
        self._wait()

    def _wait(self) -> None:
        while self._coming:
            self._coming.pop().wait()

    def forget(self) -> None:
        super().forget()
        self._coming.clear()
        self._on_way.clear()
        self._counter.clear()
        self._rest()

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
        whole = self._at_first(buffer)
        return {} if self.team.rank else self._state_of(whole)

    def _at_first(self, buffer: Tensor) -> Tensor:
        """All rows of a buffer (m,), on the host of rank 0; nothing on the others."""
        whole = torch.empty(0 if self.team.rank else self._whole, dtype=buffer.dtype)
        for bucket in self._cut:
            came = buffer.new_empty(self.ranks * bucket.size)
            self.team.gather(came, bucket.own(buffer)).wait()
            if self.team.rank == 0:
                bucket.whole(whole).copy_(came)
        return whole

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], buffer: Tensor | None = None) -> None:
        """Each rank fills its rows from all there are."""
        self._check_fits(state)
        self._fill(self.master if buffer is None else buffer, state)
        if buffer is None:
            self._republish()

    def _fill(self, rows: Tensor, state: Mapping[str, Any]) -> None:
        for name, place in self._state_of(self.compute).items():
            if name in self._layouts:
                inside = int(place.storage_offset() - self.compute.storage_offset()) - self._layouts[name][0]
                self._put(rows, name, state[name], inside, place.stride())
            else:
                place.copy_(state[name])

    def release(self) -> nn.Module:
        self._wait()
        for handle in self._heard:
            handle.remove()
        self._point_at(self._all_rows(self.master if self.average is None else self.average))
        for p in self.module.parameters():
            p.data = p.data.clone()
        return self.module

    def _republish(self) -> None:
        if self.rows is not self.master:
            self.rows.copy_(self.master)
        self._stale = True
        self.arrive()

    def _all_rows(self, buffer: Tensor) -> Tensor:
        """All rows of a buffer (m,), with the padding at their end."""
        whole = buffer.new_empty(self._whole)
        for bucket in self._cut:
            self.team.gather(bucket.whole(whole), bucket.own(buffer)).wait()
        return whole

    def _mine(self, name: str) -> list[tuple[int, int]]:
        """From where to where the elements of a parameter lie in this rank's rows."""
        start, shape, _ = self._layouts[name]
        found = pieces(self._cut, self.team.rank, start, shape.numel())
        return [(piece.mine, piece.mine + piece.length) for piece in found]

    def _put(
        self, buffer: Tensor, name: str, value: Tensor, inside: int, strides: tuple[int, ...] | None = None
    ) -> None:
        """Write what a buffer (m,) has of a parameter; see `units.put`."""
        put(buffer, value, self._layouts[name], self._cut, self.team.rank, inside, strides)
