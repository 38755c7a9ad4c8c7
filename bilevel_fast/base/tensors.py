"""Tensors into a safetensors file one after the other, and out of it as they lie there.

    8 bytes   length of the header, little-endian
    header    JSON: {name: {"dtype", "shape", "data_offsets"}}, padded with spaces to a multiple of 8
    the rest  the tensors, the wider dtypes first, so that each begins at a multiple of its element

Whoever writes a model holds it once, and a piece of one tensor besides.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import open_safetensors

PIECE = 2**26
"""Bytes that are copied at once, at most, where what is written does not lie in memory as it is written."""

# in the order of the file
_NAMES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ORDER = {dtype: number for number, dtype in enumerate(_NAMES)}


class Writes(Protocol):
    """What bytes can be written to."""

    def write(self, data: Any, /) -> Any: ...


def write_tensors(
    file: Writes,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write what `safetensors.torch.save` would return, and never hold it.

    Args:
        file: Gets the bytes in order.
        tensors: By name, on any device and in any memory format; they may overlap in memory.
        dtype: To store them in; each its own if None.
        metadata: Free text for the header.

    Raises:
        ValueError: A tensor has a dtype that is not one of the table.
    """
    stored = {name: dtype or tensor.dtype for name, tensor in tensors.items()}
    for name, kind in stored.items():
        if kind not in _NAMES:
            raise ValueError(f"{name} is {kind}, wanted one of {', '.join(map(str, _NAMES))}")
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    order, end = sorted(tensors, key=lambda name: (_ORDER[stored[name]], name)), 0
    for name in order:
        start, end = end, end + tensors[name].numel() * stored[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _NAMES[stored[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        for piece in _pieces(tensors[name].detach(), stored[name]):
            flat = piece.as_strided((piece.numel(),), (1,))  # where there is one element, any stride passes
            file.write(flat.view(torch.uint8).numpy())


def _pieces(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """A tensor in parts of at most `PIECE` bytes, in order, contiguous on the CPU: copies where it is not."""
    size = tensor.numel() * dtype.itemsize
    if size <= PIECE:
        if tensor.device.type != "cpu" or tensor.dtype != dtype or not tensor.is_contiguous():
            tensor = torch.empty(tensor.shape, dtype=dtype, device="cpu").copy_(tensor)
        yield tensor
        return
    rows = PIECE // (size // len(tensor))
    for part in tensor.split(rows) if rows else tensor:
        yield from _pieces(part, dtype)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, contiguous, and still in the file: a page is read when it is used.

    They are for who reads them soon. Should the file be cut short meanwhile, the process would die of it.

    Raises:
        UserError: It is missing, cut short, or not a safetensors file.
    """
    handle = open_safetensors(path)
    try:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, AttributeError, ValueError, RuntimeError) as error:  # a dtype that torch does not have
        raise UserError(f"{path} holds a tensor that cannot be read: {error}") from error
