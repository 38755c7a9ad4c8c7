"""State dicts as a file of tensors and a file of JSON: `unpack(*pack(tree))` is `tree`.

In the JSON a number, a text, true, false and null are themselves, and everything else says what it is:

    {"dict": [[key, value], ...]}   {"list": [value, ...]}   {"tuple": [value, ...]}   {"tensor": name}
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """JSON that stands for dicts, lists and tuples of plain values and tensors, and these tensors by name.

    A name is the way to its tensor: `lower/rule/first/conv_in.weight`.

    Raises:
        TypeError: A value is none of these.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(tree, (), tensors), tensors


def _pack(value: Any, way: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = "/".join(way)
        assert name not in tensors, f"two tensors lie at {name}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[_plain(k, way), _pack(v, (*way, str(k)), tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(v, (*way, str(i)), tensors) for i, v in enumerate(value)]}
    return _plain(value, way)


def _plain(value: Any, way: tuple[str, ...]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{'/'.join(way)} holds a {type(value).__name__}, wanted tensors and plain values")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given.

    Raises:
        KeyError, TypeError, ValueError: It was not `pack` that made these.
    """
    if not isinstance(packed, dict):
        return packed
    ((kind, held),) = packed.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "dict":
        return {key: unpack(value, tensors) for key, value in held}
    values = [unpack(value, tensors) for value in held]
    return {"list": list, "tuple": tuple}[kind](values)
