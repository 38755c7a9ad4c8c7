"""Networks whose weights lie on all ranks in parts, and are whole on one of them only while a layer computes.

    unit    the parameters of a ResNet, of a Transformer block, or of what is left around them: what is whole at once
    open    everybody's rows of a unit -> memory that its parameters are views of
    close   that memory is given back

A unit is open during its module's forward pass. Of weights, autograd keeps where they lie and not what they are: when
backward asks for one, its unit is opened again, and who waits for its gradients closes it. While a unit computes, the
one that came next the last time is on its way. All ranks run the same networks, so all open in one order.

arXiv:1910.02054, third stage. torch's `fully_shard` does the same for networks of another kind: it refuses weights in
channels_last, and hands blocks copies of their arguments, so that the skip connections of a UNet are lost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bilevel_fast.models.layers import Resample, ResNet, Transformer, TransformerBlock
from bilevel_fast.scale.rows import ROW, Bucket, pieces
from bilevel_fast.scale.team import Pending, Team
from bilevel_fast.training.parameters import ALIGN

Layout = tuple[int, torch.Size, tuple[int, ...]]
"""Of a parameter: where it begins in a buffer (N,), its shape and its strides."""

_OWNERS = (ResNet, Transformer, TransformerBlock, Resample)


def members(network: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """The modules whose parameters are whole together, and their names: the network itself with what no other has."""
    owners = {"": network} | {name: module for name, module in network.named_modules() if isinstance(module, _OWNERS)}
    found: dict[str, list[str]] = {name: [] for name in owners}
    for name, _ in network.named_parameters():
        path = name.split(".")[:-1]
        ways = accumulate(path, lambda way, part: f"{way}.{part}")
        found[next((way for way in reversed([*ways]) if way in owners), "")].append(name)
    return [(owners[name], names) for name, names in found.items() if names]


def lay_out(network: nn.Module, values: Mapping[str, Tensor], world: int) -> tuple[dict[str, Layout], list[Bucket]]:
    """A place in (N,) for each parameter, unit by unit, and the units as buckets, each of whole rows for every rank.

    Args:
        values: What has the parameters' shapes and strides, by name.
    """
    layouts, cut, start, mine = dict[str, Layout](), list[Bucket](), 0, 0
    for _, names in members(network):
        end = start
        for name in names:
            p = values[name]
            layouts[name] = (end, p.shape, p.stride())
            end += -(-p.numel() // ALIGN) * ALIGN
        size = -(-(end - start) // (world * ROW)) * ROW
        cut.append(Bucket(start, mine, size, world))
        start, mine = start + world * size, mine + size
    return layouts, cut


def put(
    rows: Tensor,
    value: Tensor,
    layout: Layout,
    cut: Sequence[Bucket],
    rank: int,
    inside: int = 0,
    strides: tuple[int, ...] | None = None,
) -> None:
    """Write what `rank` has of a parameter to its (m,).

    Args:
        value: The parameter, or what its network says of it, which may leave out padding.
        inside: Where its first element lies in the parameter.
        strides: Of its elements in the parameter; the parameter's own if None.
    """
    start, shape, own = layout
    found = list(pieces(cut, rank, start, shape.numel()))
    if not found:
        return
    flat = torch.zeros(shape.numel(), dtype=rows.dtype, device=value.device)
    flat.as_strided(value.shape, strides or own, inside).copy_(value)  # in the order of the buffer
    for piece in found:
        rows[piece.mine : piece.mine + piece.length] = flat[piece.after : piece.after + piece.length]


@dataclass(eq=False)
class Unit:
    """One of them.

    Attributes:
        buffer: (world n,), of which its parameters are views; has no memory while the unit is closed.
        own: (n,), this rank's part.
        on_way: Set while it is opened.
    """

    buffer: Tensor
    own: Tensor
    is_open: bool = False
    on_way: Pending | None = None


class Units:
    """Opens and closes the units of a network.

    Args:
        network: Its parameters become views of the units' buffers, all of them closed.
        layouts, cut: Of `lay_out`.
        rows: (m,) this rank's part of all weights, which is read whenever a unit is opened.
        team: The ranks.

    Attributes:
        backward: Set by the owner while a backward pass runs: what is computed again then stays open.
        peak: Elements that were whole at once, at most.
    """

    def __init__(
        self, network: nn.Module, layouts: Mapping[str, Layout], cut: Sequence[Bucket], rows: Tensor, team: Team
    ):
        self.team, self.backward, self.peak = team, False, 0
        self.units, self._of = list[Unit](), dict[int, Unit]()
        self._next, self._before = dict[Unit, Unit](), dict[Unit, Unit]()
        self._latest: Unit | None = None
        self._saving: list[saved_tensors_hooks] = []
        self._handles = [
            network.register_forward_pre_hook(self._begin, prepend=True),
            network.register_forward_hook(self._end, always_call=True),
        ]
        for bucket, (module, names) in zip(cut, members(network), strict=True):
            buffer = rows.new_empty(bucket.world * bucket.size)
            unit = self._of[buffer.untyped_storage()._cdata] = Unit(buffer, bucket.own(rows))
            self.units.append(unit)
            for name in names:
                start, shape, strides = layouts[name]
                network.get_parameter(name).data = unit.buffer.as_strided(shape, strides, start - bucket.start)
            self._free(unit)
            if module is not network:
                self._handles.append(module.register_forward_pre_hook(partial(self._enter, unit), prepend=True))
                self._handles.append(module.register_forward_hook(partial(self._leave, unit)))

    @classmethod
    @torch.no_grad()
    def frozen(
        cls, network: nn.Module, values: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype, team: Team
    ) -> Self:
        """Of a network that is not trained, whose parameters become `values`, by name. These may lie elsewhere, or be
        its parameters themselves: no second one is made whole.
        """
        layouts, cut = lay_out(network, values, team.world)
        rows = torch.zeros(sum(bucket.size for bucket in cut), dtype=dtype, device=device)
        for name, value in values.items():
            put(rows, value, layouts[name], cut, team.rank)
        return cls(network, layouts, cut, rows, team)

    def open(self, unit: Unit) -> None:
        """Make a unit whole, and send for the one that comes after it."""
        self._send_for(unit)
        if unit.on_way is None:
            return
        unit.on_way.wait()
        unit.on_way = None
        after = (self._before if self.backward else self._next).get(unit)
        if after is not None:
            self._send_for(after)

    def close(self, unit: Unit) -> None:
        if unit.is_open:
            if unit.on_way is not None:
                unit.on_way.wait()
                unit.on_way = None
            self._free(unit)

    def close_all(self) -> None:
        for unit in self.units:
            self.close(unit)

    def leave(self) -> None:
        """The network is on its own again; its parameters are empty."""
        self.close_all()
        for handle in self._handles:
            handle.remove()

    def _send_for(self, unit: Unit) -> None:
        if unit.is_open:
            return
        unit.is_open = True
        unit.buffer.untyped_storage().resize_(unit.buffer.numel() * unit.buffer.element_size())
        self.peak = max(self.peak, sum(other.buffer.numel() for other in self.units if other.is_open))
        unit.on_way = self.team.gather(unit.buffer, unit.own)

    def _free(self, unit: Unit) -> None:
        unit.is_open = False
        unit.buffer.untyped_storage().resize_(0)

    def _begin(self, *_: Any) -> None:
        self._latest = None
        if not self.backward:
            self._saving.append(saved_tensors_hooks(self._pack, self._unpack))
            self._saving[-1].__enter__()
        self._enter(self.units[0])

    def _end(self, *_: Any) -> None:
        if not self.backward:
            self._saving.pop().__exit__()
            self.close_all()

    def _enter(self, unit: Unit, *_: Any) -> None:
        if not self.backward:
            if self._latest is not None:
                self._next[self._latest], self._before[unit] = unit, self._latest
            self._latest = unit
        self.open(unit)

    def _leave(self, unit: Unit, *_: Any) -> None:
        if not self.backward:
            self.close(unit)

    def _pack(self, x: Tensor) -> Any:
        unit = self._of.get(x.untyped_storage()._cdata)
        return x if unit is None else (unit, x.shape, x.stride(), x.storage_offset())

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        unit, *place = packed
        self.open(unit)
        return unit.buffer.as_strided(*place)
