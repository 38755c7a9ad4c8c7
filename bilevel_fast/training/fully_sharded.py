"""Parameters of several ranks of which none has the whole network: weights, too, lie there in parts (`units`).

    master, average, gradient   (m,)  fp32       this rank's rows, as in `sharded`; a unit is a bucket
    rows                        (m,)  as dtype   this rank's part of what the networks compute with

Gradients of a unit leave as soon as all of them are there, and what has come is added up in this rank's rows: so every
part of a batch is sent by itself. Sums over ranks have one order, but parts are added up after ranks and not before,
and norms are over other rows than without: another number of ranks, or one alone, is the same up to rounding.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_fast.scale.rows import Bucket
from bilevel_fast.training.sharded import ShardedParameters
from bilevel_fast.training.units import Units, lay_out


class FullyShardedParameters(ShardedParameters):
    """`ShardedParameters` without `compute` and `local`: between passes, the module's parameters are empty.

    Its forward passes are collective: all ranks make the same ones. It is a UNet, and has no buffers.
    """

    def _lay_out(self, module: nn.Module, dtype: torch.dtype) -> int:
        super()._lay_out(module, dtype)
        parameters = dict(module.named_parameters())
        self._layouts, self._cut = lay_out(module, parameters, self.ranks)
        self._saved = dict[str, tuple[torch.Size, tuple[int, ...], int]]()
        for name, value in module.state_dict().items():  # asked now: later there is nothing to look at
            inside = int(value.storage_offset() - parameters[name].storage_offset())
            self._saved[name] = value.shape, value.stride(), inside
        return sum(bucket.world * bucket.size for bucket in self._cut)

    def _buckets(self) -> list[Bucket]:
        return self._cut

    def _hold(self, dtype: torch.dtype) -> None:
        self._units = Units(self.module, self._layouts, self._cut, self.rows, self.team)
        self._parameters = [(name, self.module.get_parameter(name)) for name in self._layouts]

    def expect(self, part: int, parts: int, add: bool) -> None:
        self._ends, self._add, self._units.backward = True, add or part > 0, True

    def take(self, part: int, parts: int, add: bool) -> None:
        """Collective with each of the parts, as is the backward pass before it."""
        super().take(part, parts, add)
        self._units.backward = False
        self._units.close_all()

    def _landed(self, place: int, _: Tensor) -> None:
        if not self._ends:
            return
        self._awaited[place] -= 1
        if self._awaited[place]:
            return
        self._units.close(self._units.units[place])
        while self._next >= 0 and not self._awaited[self._next]:
            self._send()

    def _found(self, bucket: Bucket, ending: list[int]) -> Tensor:
        x = torch.zeros(self.ranks * bucket.size, dtype=self.dtype, device=self.master.device)
        taken = list[tuple[nn.Parameter, Tensor]]()
        for name, p in (self._parameters[n] for n in ending):
            start, shape, strides = self._layouts[name]
            taken.append((p, x.as_strided(shape, strides, start - bucket.start)))
        self._collect(taken, add=False)
        return x

    def publish(self) -> None:
        """A unit is opened with what its rows hold then."""

    def _state_of(self, whole: Tensor) -> dict[str, Tensor]:
        return {
            name: whole.as_strided(shape, strides, whole.storage_offset() + self._layouts[name][0] + inside)
            for name, (shape, strides, inside) in self._saved.items()
        }

    def _shapes(self) -> dict[str, torch.Size]:
        return {name: shape for name, (shape, _, _) in self._saved.items()}

    def _fill(self, rows: Tensor, state: Mapping[str, Any]) -> None:
        for name, (_, strides, inside) in self._saved.items():
            self._put(rows, name, state[name], inside, strides)

    def release(self) -> nn.Module:
        """Collective. The network is whole on the host of rank 0, and empty on the others."""
        for handle in self._heard:
            handle.remove()
        self._units.leave()
        whole = self._at_first(self.master if self.average is None else self.average)
        if self.team.rank == 0:
            self._point_at(whole)
        return self.module
