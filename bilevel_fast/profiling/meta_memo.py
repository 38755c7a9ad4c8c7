"""What an op makes on the meta device, remembered: a network has few shapes and calls each op on them many times.

Torch works out shapes on the meta device in Python, half a millisecond for an op. An op that is seen again with
arguments of the same sizes, strides and dtypes that share storages in the same way makes what it made before.
"""

from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class _NotPlain(Exception):
    """A value that is no tensor of the meta device, and nothing that can be compared."""


class Remembered:
    """An op with arguments of some sizes.

    Attributes:
        cost: For whoever counts; () until it is known.
    """

    def __init__(self, made: Any):
        self._made = made
        self.cost: Any = ()

    def again(self) -> Any:
        """New tensors like those that were made."""
        return _build(self._made)


_known: dict[Any, Remembered] = {}
_undeclared: set[torch._ops.OpOverload] = set()
"""Ops that have returned an argument's storage although their schema does not say so, as `aten::_unsafe_view`."""


def key(func: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any]) -> Any | None:
    """What decides the sizes of an op's results; None where something else may, or where arguments are changed."""
    if func in _undeclared or not _makes_new(func):
        return None
    storages: dict[int, int] = {}
    try:
        values = tuple(_of(x, storages) for x in args), tuple((name, _of(x, storages)) for name, x in kwargs.items())
    except _NotPlain:
        return None
    return (func, values) if storages else None


def recall(key: Any) -> Remembered | None:
    """What was remembered under a `key`."""
    return _known.get(key)


def remember(key: Any, args: Any, kwargs: dict[str, Any], out: Any) -> Remembered | None:
    """Keep what an op has made; None if that is more than tensors of the meta device with storages of their own."""
    seen: set[int] = set()
    given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    if any(isinstance(t, Tensor) and t.untyped_storage()._cdata in given for t in tree_leaves(out)):
        _undeclared.add(key[0])
        return None
    try:
        found = _known[key] = Remembered(_spec(out, seen))
    except _NotPlain:
        return None
    return found


@cache
def _makes_new(func: torch._ops.OpOverload) -> bool:
    schema = func._schema
    return not (func.is_view or schema.is_mutable or any(value.alias_info is not None for value in schema.returns))


def _of(x: Any, storages: dict[int, int]) -> Any:
    if isinstance(x, Tensor):
        if type(x) not in (Tensor, nn.Parameter) or x.device.type != "meta":
            raise _NotPlain
        storage = storages.setdefault(x.untyped_storage()._cdata, len(storages))
        return x.shape, x.stride(), x.dtype, x.storage_offset(), storage
    if type(x) in (list, tuple):
        return tuple(_of(one, storages) for one in x)
    if type(x) not in _PLAIN:
        raise _NotPlain
    return type(x), x  # 1 equals True and 1.0


def _spec(out: Any, seen: set[int]) -> Any:
    if isinstance(out, Tensor):
        storage, sizes = out.untyped_storage(), zip(out.shape, out.stride(), strict=True)
        span = sum((size - 1) * stride for size, stride in sizes) + 1 if prod(out.shape) else 0
        fills = storage.nbytes() == span * out.itemsize and out.storage_offset() == 0
        if out.device.type != "meta" or not fills or storage._cdata in seen:
            raise _NotPlain
        seen.add(storage._cdata)
        return (out.shape, out.stride(), out.dtype)
    if type(out) in (list, tuple):
        return [_spec(one, seen) for one in out]
    if type(out) not in _PLAIN:
        raise _NotPlain
    return out


def _build(made: Any) -> Any:
    if type(made) is tuple:
        shape, stride, dtype = made
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return tuple(_build(one) for one in made) if type(made) is list else made
