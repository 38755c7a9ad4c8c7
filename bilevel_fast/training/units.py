"""Networks whose weights lie on all ranks in parts, and are whole on one of them only while a layer computes.

    unit    the parameters of a block, or where that is large, of a ResNet or a Transformer block in it; what is left
            around them is one, too
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
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bilevel_fast.models.layers import Resample, ResNet, Transformer, TransformerBlock
from bilevel_fast.models.unet import Block
from bilevel_fast.scale.rows import ROW, Bucket, pieces
from bilevel_fast.scale.team import Pending, Team
from bilevel_fast.training.parameters import ALIGN

Layout = tuple[int, torch.Size, tuple[int, ...]]
"""Of a parameter: where it begins in a buffer (N,), its shape and its strides."""

_OWNERS = (Block, ResNet, Transformer, TransformerBlock, Resample)
SMALL = 2**25
"""Parameters of a module that is one unit with all that is in it: 67 MB in bf16. Smaller messages cost more."""


@dataclass(frozen=True)
class Member:
    """What is whole together.

    Attributes:
        module: In whose forward pass.
        names: Of its parameters.
        inner: Modules within that may be computed again by themselves, in a backward pass.
    """

    module: nn.Module
    names: list[str]
    inner: list[nn.Module]


def members(network: nn.Module, sizes: Mapping[str, int]) -> list[Member]:
    """The units of a network, the first of which has what no other one has.

    Args:
        sizes: Elements of each parameter.
    """
    owners = {"": network}

    def visit(path: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            way = f"{path}{name}."
            if isinstance(child, _OWNERS):
                owners[way] = child
                if sum(size for other, size in sizes.items() if other.startswith(way)) <= SMALL:
                    continue
            visit(way, child)

    visit("", network)
    found: dict[str, list[str]] = {way: [] for way in owners}
    for name in sizes:
        found[max((way for way in owners if name.startswith(way)), key=len)].append(name)
    known = set(owners.values())
    return [
        Member(
            owners[way],
            names,
            [m for m in owners[way].modules() if way and isinstance(m, _OWNERS) and m not in known],
        )
        for way, names in found.items()
        if names
    ]


def lay_out(network: nn.Module, values: Mapping[str, Tensor], world: int) -> tuple[dict[str, Layout], list[Bucket]]:
    """A place in (N,) for each parameter, unit by unit, and the units as buckets, each of whole rows for every rank.

    Args:
        values: What has the parameters' shapes and strides, by name.
    """
    layouts, cut, start, mine = dict[str, Layout](), list[Bucket](), 0, 0
    for member in members(network, {name: value.numel() for name, value in values.items()}):
        end = start
        for name in member.names:
            p = values[name]
            layouts[name] = (end, p.shape, p.stride())
            end += -(-p.numel() // ALIGN) * ALIGN
        size = -(-(end - start) // (world * ROW)) * ROW
        cut.append(Bucket(start, mine, size, world))
        start, mine = start + world * size, mine + size
    return layouts, cut


def most_open(network: nn.Module, cut: Sequence[Bucket], recompute: bool) -> int:
    """Elements that are whole at once, at most.

    That is what is around all units, and four of them: a Transformer, its block, and those before and after. Where a
    Transformer is computed again, it is all of its blocks.
    """
    around, *others = (bucket.world * bucket.size for bucket in cut)
    together = sum(sorted(others)[-4:])
    if recompute:
        found = members(network, {name: p.numel() for name, p in network.named_parameters()})
        for transformer in (module for module in network.modules() if isinstance(module, Transformer)):
            within = set(transformer.modules())
            pairs = zip(found[1:], others, strict=True)
            again = sum(size for member, size in pairs if member.module in within)
            together = max(together, again + sum(sorted(others)[-2:]))
    return around + together


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
        sizes = {name: shape.numel() for name, (_, shape, _) in layouts.items()}
        found = members(network, {name: sizes[name] for name, _ in network.named_parameters()})
        for bucket, member in zip(cut, found, strict=True):
            buffer = rows.new_empty(bucket.world * bucket.size)
            unit = self._of[buffer.untyped_storage()._cdata] = Unit(buffer, bucket.own(rows))
            self.units.append(unit)
            for name in member.names:
                start, shape, strides = layouts[name]
                network.get_parameter(name).data = unit.buffer.as_strided(shape, strides, start - bucket.start)
            self._free(unit)
            if member.module is not network:
                for module in (member.module, *member.inner):
                    self._handles.append(module.register_forward_pre_hook(partial(self._enter, unit), prepend=True))
                self._handles.append(member.module.register_forward_hook(partial(self._leave, unit)))

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
            if self._latest is not None and self._latest is not unit:
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
