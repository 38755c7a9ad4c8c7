"""All parameters of a network in flat buffers: what computes, what is trained, what is learnt from.

    master    (N,) fp32         what the optimizers move
    compute   (N,) fp32 | bf16  what the network computes with: its parameters are views of it; the masters if fp32
    gradient  (N,) as compute   what is descended; fp32 where the gradients of several micro-batches are added up
    average   (N,) fp32         moving average of the masters, where one is kept

The optimizer step, the norm of the gradient and the cast to bf16 are then a launch or two each, at addresses that
never change, as a CUDA graph wants them. Every parameter starts at a multiple of `ALIGN` elements and keeps its memory
order (channels_last); N is a multiple of `CHUNK`. What lies between parameters is and stays zero.

Backward hands each parameter a gradient of its own, and `collect` copies all of them into the buffer at once. If the
parameters' gradients were views of the buffer, backward would add to each: a launch per parameter, a buffer to zero
before, and twice the traffic. After a single backward pass they are copied only when somebody asks for `gradient`: an
optimizer that can reads them where they lie (`apart`).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_fast.training.phases import phase
from bilevel_kernels.adamw_ema import EVEN, GROUP, Places

ALIGN = 64  # elements: 128 bytes of bf16, a cache line of every card
CHUNK = 2**16  # elements: a row of the first pass of the norm
_PART = 2**26  # elements that an inner product widens at once
_LARGE = 2**12  # elements from which on a gradient is worth a place of its own
assert ALIGN % GROUP == 0, "a group of elements has one parameter"


class FlatParameters:
    """Moves the parameters of a network into flat buffers; the network stays usable as it is.

    Args:
        module: All its parameters are trained, and lie dense in memory, in whatever order. Their values are kept.
        dtype: What the network computes in, float32 or bfloat16.
        average: Whether a moving average is kept; it starts at the parameters.
        summed: Whether gradients of several backward passes are added up: then they are added in fp32.

    Raises:
        ValueError: A parameter is frozen, has gaps or is not fp32, or the dtype is another one.

    Attributes:
        size: N.
        ranks: Processes that share a batch, each of which holds (m,) of all N rows of masters, gradient and average.
            Here it is one, and m is N; `scale` has the others.
        leaves: Equal parts of a batch that this process takes one after the other.
        rows: (m,) of `compute` that an optimizer step writes; the masters if fp32.
        copies: Whether a state dict is a copy on the host, which later steps do not change.
    """

    ranks, leaves, copies = 1, 1, False

    def __init__(
        self, module: nn.Module, dtype: torch.dtype = torch.float32, average: bool = False, summed: bool = False
    ):
        self.size, device = self._lay_out(module, dtype), next(module.parameters()).device
        self.master = torch.zeros(self.size, device=device)
        for name, view in self.views(self.master).items():
            view.copy_(module.get_parameter(name).detach())
        self.average = self.master.clone() if average else None
        self.compute = self.master if dtype == torch.float32 else self.master.to(dtype)
        self.gradient = torch.zeros(self.size, dtype=torch.float32 if summed else dtype, device=device)
        self.rows = self.compute
        self._point_at(self.compute)
        self._taken = [(module.get_parameter(name), view) for name, view in self.views(self._gradient).items()]

    @property
    def gradient(self) -> Tensor:
        """(m,) what was found last."""
        self.settle()
        assert not self._spent, "an optimizer has read this gradient where backward had left it"
        return self._gradient

    @gradient.setter
    def gradient(self, buffer: Tensor) -> None:
        self._gradient = buffer

    def settle(self) -> None:
        """Move a gradient that still lies where backward has left it into the buffer."""
        if self._left is not None:
            with phase("optimizer"):
                self._move(self._left)
            self._left = None

    def _lay_out(self, module: nn.Module, dtype: torch.dtype) -> int:
        """Find each parameter its place; returns N."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype}: parameters compute in float32 or bfloat16")
        self.module, self.dtype = module, dtype
        self._left: list[Tensor | None] | None = None  # of each parameter, after a single backward pass
        self._spent = False
        self._places: Places | None = None
        self._layouts: dict[str, tuple[int, torch.Size, tuple[int, ...]]] = {}
        end = 0
        for name, p in module.named_parameters():
            _check(name, p)
            self._layouts[name] = (end, p.shape, p.stride())
            end += -(-p.numel() // ALIGN) * ALIGN
        return -(-end // CHUNK) * CHUNK

    def views(self, buffer: Tensor, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Where each parameter, or each of `names`, lies in a buffer (N,): in its own shape and strides."""
        found = self._layouts if names is None else {name: self._layouts[name] for name in names}
        return {
            name: buffer.as_strided(shape, strides, buffer.storage_offset() + start)
            for name, (start, shape, strides) in found.items()
        }

    def collect(self, add: bool = False) -> None:
        """Move the gradients that backward has left at the parameters into the buffer.

        Where both have one dtype that is a launch or two for all of them, else one for each.

        Args:
            add: Add to what the buffer holds, instead of replacing it.
        """
        if add:
            self.settle()
        self._left, self._spent = None, False
        self._move(self._released(), add)

    def _collect(self, taken: Sequence[tuple[nn.Parameter, Tensor]], add: bool) -> None:
        """`collect` of some parameters, given with their places."""
        given = [(view, p.grad) for p, view in taken if p.grad is not None]
        untouched = [] if add else [view for p, view in taken if p.grad is None]
        _write([view for view, _ in given], [g for _, g in given], untouched, add)
        for p, _ in taken:
            p.grad = None

    def _released(self) -> list[Tensor | None]:
        """What the parameters hold as gradients, and they no longer."""
        found = [p.grad for p, _ in self._taken]
        for p, _ in self._taken:
            p.grad = None
        return found

    def _move(self, gradients: Sequence[Tensor | None], add: bool = False) -> None:
        """Write gradients, one for each parameter, into the buffer, or add them to it; where there is none, zeros."""
        pairs = list(zip([view for _, view in self._taken], gradients, strict=True))
        given = [(view, g) for view, g in pairs if g is not None]
        untouched = [] if add else [view for view, g in pairs if g is None]
        _write([view for view, _ in given], [g for _, g in given], untouched, add)

    def _large(self) -> list[bool]:
        """Which parameters have gradients that are worth a place of their own."""
        return [p.numel() >= _LARGE and p.numel() % EVEN == 0 for p, _ in self._taken]

    def place(self) -> None:
        """Find large gradients their places, for `apart`: before the first step, which takes nothing from the host."""
        layouts = list(compress(self._layouts.values(), self._large()))
        starts, sizes = [start for start, _, _ in layouts], [shape.numel() for _, shape, _ in layouts]
        self._places = Places.of(self.size, starts, sizes, self.master.device)

    def apart(self) -> "Apart | None":
        """The gradient where backward has left it, for an optimizer; None where it is in the buffer or has no places.

        Whoever asks has used it up. What is small, lies otherwise than its parameter or is not there at all is in the
        buffer.
        """
        if self._left is None or self._places is None:
            return None
        left, self._left, self._spent = self._left, None, True
        large = self._large()
        whole, into, found, untouched = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
        for (_, view), g, is_large in zip(self._taken, left, large, strict=True):
            if g is None:
                untouched.append(view)
            elif is_large and _lie_alike(g, view):
                whole.append(g)
                continue
            else:
                into.append(view)
                found.append(g)
            whole.append(view)
        _write(into, found, untouched)
        return Apart(self._gradient, whole, list(compress(whole, large)), self._places)

    def expect(self, part: int, parts: int, add: bool) -> None:
        """Called before the backward pass whose gradient `take` is called for, as that is: it may begin meanwhile."""

    def take(self, part: int, parts: int, add: bool) -> None:
        """`collect` the gradient of a part of a batch; after the last of `parts`, `gradient` is that of all of them.

        Args:
            part: Its number, from 0.
            add: Add the whole batch's to the gradient that is there, instead of replacing it.
        """
        if parts == 1 and not add:
            self._left, self._spent = self._released(), False
        else:
            self.collect(add or part > 0)

    def everywhere(self, numbers: Tensor) -> Tensor:
        """(n, ...) numbers of this process's parts of a batch -> (n ranks, ...) those of all parts, in their order."""
        return numbers

    def norm(self, buffer: Tensor | None = None) -> Tensor:
        """Euclidean norm of a buffer (m,), of the gradient if None, over all ranks, () fp32."""
        return norm(self.gradient if buffer is None else buffer)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner product of two buffers (m,) over all ranks, () fp32."""
        return dot(a, b)

    def gathered(self, buffer: Tensor) -> Tensor:
        """All N elements of a buffer (m,)."""
        return buffer

    def own(self, whole: Tensor) -> Tensor:
        """The (m,) that are this rank's of N elements."""
        return whole

    def gradients(self, names: Collection[str]) -> list[Tensor]:
        """What `gradient` holds of some parameters, as views."""
        return list(self.views(self._gradient, names).values())

    def moved(self) -> None:
        """Called when `rows` were written: by an optimizer, or by the replay of a step that had one."""

    def publish(self) -> None:
        """Begin to bring `rows` to the network, on all ranks, which waits by itself; here they are there already."""

    def arrive(self) -> None:
        """Return when the network has what `rows` hold; its forward pass calls this."""

    def forget(self) -> None:
        """Drop gradients that a step has left which was broken off: the next backward pass would add to them."""
        self._released()
        self._left = None

    @contextmanager
    def at(self, other: Tensor) -> Iterator[None]:
        """The network computes with `other` (m,) fp32 in place of the masters. Collective.

        Nobody looks at either meanwhile: where the network computes with the masters, the two change places.
        """
        self._show(other)
        try:
            yield
        finally:
            self._show(other, again=True)

    def _show(self, other: Tensor, again: bool = False) -> None:
        if self.rows is not self.master:
            self.rows.copy_(self.master if again else other)
        else:
            for ours, theirs in zip(self.master.split(_PART), other.split(_PART), strict=True):
                kept = ours.clone()
                ours.copy_(theirs)
                theirs.copy_(kept)
        self.moved()
        self.publish()

    @contextmanager
    def whole(self) -> Iterator[list[Tensor]]:
        """The masters, and the average where there is one, (N,) each; what changes them changes the network."""
        yield [self.master] if self.average is None else [self.master, self.average]
        if self.compute is not self.master:
            self.compute.copy_(self.master)

    def state_dict(self, buffer: Tensor | None = None) -> dict[str, Tensor]:
        """The network's state dict as views of a buffer (N,) of any dtype, of the masters if None: nothing is copied.

        They change with the buffer. What the network holds beside parameters is in it as it is.
        """
        return self._state_of(self.master if buffer is None else buffer)

    def _state_of(self, whole: Tensor) -> dict[str, Tensor]:
        """Views of a buffer (N,), and what is no parameter."""
        found, shift = dict[str, Tensor](), whole.storage_offset() - self.compute.storage_offset()
        for name, value in self.module.state_dict().items():
            place = (value.shape, value.stride(), value.storage_offset() + shift)
            found[name] = whole.as_strided(*place) if name in self._layouts else value
        return found

    def saved(self, other: Tensor) -> Tensor:
        """A tensor that is no buffer of these, as a state dict has it: a copy if `copies`."""
        return other.clone() if self.copies else other

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], buffer: Tensor | None = None) -> None:
        """Fill a buffer (N,) from what `state_dict` returned; the masters, and with them the network, if None.

        Tensor by tensor, from wherever each lies. What the state dict leaves out, padding, stays as it is: zero.

        Raises:
            RuntimeError: Names or shapes are not the network's; nothing has changed then.
        """
        self._check_fits(state)
        for name, place in self.state_dict(buffer).items():
            place.copy_(state[name])
        if buffer is None and self.compute is not self.master:
            self.compute.copy_(self.master)

    def _shapes(self) -> dict[str, torch.Size]:
        """Of what the network's state dict holds."""
        return {name: value.shape for name, value in self.module.state_dict().items()}

    def _check_fits(self, state: Mapping[str, Any]) -> None:
        wanted = self._shapes()
        for name in sorted(wanted.keys() ^ state.keys()):
            raise RuntimeError(f"{name} is {'missing' if name in wanted else 'not of this network'}")
        for name, shape in wanted.items():
            if state[name].shape != shape:
                raise RuntimeError(f"size mismatch: {name} has shape {list(state[name].shape)}, wanted {list(shape)}")

    def release(self) -> nn.Module:
        """Give the network parameters of its own: fp32, the average where one is kept. Returns the network."""
        self._point_at(self.master if self.average is None else self.average)
        for p in self.module.parameters():
            p.data = p.data.clone()
        return self.module

    def _point_at(self, buffer: Tensor) -> None:
        for name, view in self.views(buffer).items():
            self.module.get_parameter(name).data = view


@dataclass(frozen=True)
class Apart:
    """A gradient that lies where backward has left it.

    Attributes:
        buffer: (N,), which holds the rest.
        all: The gradient of each parameter.
        large: Those that lie at `places`, elsewhere or in the buffer.
    """

    buffer: Tensor
    all: list[Tensor]
    large: list[Tensor]
    places: Places

    def norm(self) -> Tensor:
        """Euclidean norm of all of it, () fp32."""
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(self.all, 2, dtype=torch.float32)))  # pyright: ignore


def _write(into: list[Tensor], found: list[Tensor], untouched: list[Tensor], add: bool = False) -> None:
    if into:
        (torch._foreach_add_ if add else torch._foreach_copy_)(into, found)  # pyright: ignore[reportPrivateImportUsage]
    if untouched:
        torch._foreach_zero_(untouched)  # pyright: ignore[reportPrivateImportUsage]


def _lie_alike(g: Tensor, view: Tensor) -> bool:
    """Whether a gradient lies in memory as its parameter does, from a multiple of 16 bytes on."""
    alike = all(a == b for a, b, size in zip(g.stride(), view.stride(), g.shape, strict=True) if size > 1)
    return bool(alike and g.dtype == view.dtype and g.storage_offset() * g.itemsize % 16 == 0)


def norm(buffer: Tensor) -> Tensor:
    """Euclidean norm of a buffer (N,), () fp32, in two passes: one sum over all of it would lose small addends."""
    rows = torch.linalg.vector_norm(buffer.view(-1, CHUNK), dim=1, dtype=torch.float32)
    return torch.linalg.vector_norm(rows)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two buffers (N,), () fp32. bf16 is widened a part at a time, never a whole buffer."""
    parts = zip(a.split(_PART), b.split(_PART), strict=True)
    return torch.stack([(x.float() * y.float()).sum() for x, y in parts]).sum()


def _check(name: str, p: nn.Parameter) -> None:
    if not p.requires_grad or p.dtype != torch.float32:
        raise ValueError(f"parameter {name}: {p.dtype}{'' if p.requires_grad else ', frozen'}; expected trained fp32")
    last_first = sorted(zip(p.stride(), p.shape, strict=True))
    expected = 1
    for stride, size in last_first:
        if size > 1 and stride != expected:
            raise ValueError(f"parameter {name}: strides {p.stride()} of shape {tuple(p.shape)} leave gaps")
        expected *= size
