"""Files of `torch.save` and `torch.jit.save`, read without running what is in them.

    torch.save       a zip of `data.pkl` and `data/N`, or a pickle with the storages behind it: torch's `weights_only`
    torch.jit.save   a zip with `code/` besides. Loading one runs the `__setstate__` that its author wrote, so it is
                     never loaded: its pickle is read with stand-ins for all classes, and its tensors are copied out

Before anything is read from a zip, its claims are compared with its size: members that unpack to more than they are
are refused, and so are tensors that reach beyond their storage (torch looks at that itself).
"""

import io
import itertools
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.base.limits import PICKLE_BYTES

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8, "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
    "QUInt8Storage": torch.uint8, "QInt8Storage": torch.int8, "QInt32Storage": torch.int32,
}  # fmt: skip
_DEEPEST, _MODULES = 200, 2**16
_NAME, _LONGEST_TEXT = re.compile(r"[\w.]{1,200} [\w.]{1,200}"), 2**13


class Damaged(ValueError):
    """A file is cut short, or not what it says it is; the message says why, in a few words."""


class _StandIn:
    """Made in place of any object of a pickle; remembers, and does nothing."""

    path = ""
    """Of the class: module and name."""
    args: tuple[Any, ...]
    state: Any

    def __init__(self, *args: Any, **named: Any) -> None:
        """Of `__new__`, which a pickle may call alone."""

    def __new__(cls, *args: Any, **named: Any) -> "_StandIn":
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


# The one in Python, not the one in C: that one makes room for as many objects as a single byte code claims.
class _Reader(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Nothing is imported and nothing is called: every class is a stand-in."""

    def __init__(self, archive: "_Archive") -> None:
        super().__init__(io.BytesIO(archive.read("data.pkl")))
        self._archive, self._classes = archive, dict[str, type[_StandIn]]()

    def find_class(self, module: str, name: str) -> type[_StandIn]:
        path = f"{module}.{name}"
        return self._classes.setdefault(path, type("StandIn", (_StandIn,), {"path": path}))

    def persistent_load(self, pid: Any) -> "_Storage":
        _, kind, key, _, count = pid
        dtype = _STORAGES.get(kind.path.rpartition(".")[2])
        if dtype is None or type(count) is not int or count < 0:
            raise ValueError(f"storage {key!r} is of an unknown kind")
        if count * dtype.itemsize > (size := self._archive.size(f"data/{key}")):
            raise ValueError(f"storage {key!r} has {size} bytes and is said to have {count * dtype.itemsize}")
        return _Storage(str(key), dtype, count)

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("extension codes")


class _Storage:
    def __init__(self, key: str, dtype: torch.dtype, count: int) -> None:
        self.key, self.dtype, self.count = key, dtype, count


class _Archive:
    """A zip as torch writes it: one folder, nothing compressed.

    Raises:
        ValueError: It is not; or its members are said to be larger than the file.
    """

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        listed = self._zip.infolist()
        members = [member for member in listed if "/code/" not in member.filename]  # which nobody reads
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed, which torch never does")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise ValueError("its members are said to be larger than the file")
        pickles = [member.filename for member in members if member.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or len({member.filename for member in listed}) != len(listed):
            raise ValueError("it is no archive of torch")
        self._root = pickles[0].removesuffix("data.pkl")
        self._members = {member.filename: member for member in members}
        self.is_script = len(members) < len(listed) or self.has("constants.pkl")
        if self.size("data.pkl") > PICKLE_BYTES:
            raise ValueError("its pickle is too long")
        if self.has("byteorder") and self.read("byteorder") != b"little":
            raise ValueError("it is big-endian")

    def __enter__(self) -> "_Archive":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def has(self, name: str) -> bool:
        return self._root + name in self._members

    def size(self, name: str) -> int:
        return self._members[self._root + name].file_size

    def read(self, name: str) -> bytes:
        return self._zip.read(self._root + name)


def is_torchscript(path: Path) -> bool:
    """Whether it is an archive of `torch.jit.save`, as OpenAI publishes CLIP. Only names are looked at."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False
    return any("/code/" in name or name.endswith("/constants.pkl") for name in names)


def load_plain(path: Path, allowed: Sequence[Any] = (), mmap: bool = False) -> Any:
    """What `torch.save` wrote, with `weights_only`, on the CPU; of a TorchScript archive its state by name.

    Args:
        path: The file.
        allowed: Classes besides torch's own, as for `torch.serialization.safe_globals`.
        mmap: Leave the tensors in the file.

    Raises:
        UnpicklingError: It holds more than tensors, plain values and what is allowed, or is no pickle.
        OSError: It is missing, or may not be read.
        Damaged: It is cut short, or claims what is not there.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with _Archive(path) as archive:
                if archive.is_script:
                    return _script_state(_Reader(archive).load(), archive)
                _check_names(archive.read("data.pkl"))
        else:
            with path.open("rb") as file:
                try:
                    for _ in range(4):  # magic number, protocol, machine, what was saved
                        _check_names(file)
                except Damaged:
                    raise
                except (ValueError, IndexError):
                    pass  # no pickle: torch, which is asked next, has the better word for it
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol: one line about a bad file is enough
            return torch.load(path, map_location="cpu", mmap=mmap and zipped, weights_only=True)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a damaged file makes torch and zipfile raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise Damaged(str(error).partition("\n")[0] or type(error).__name__) from error


def _check_names(data: Any) -> None:
    """Refuse a pickle with a name that cannot be one: torch takes minutes to word its refusal of a very long one."""
    for code, value, _ in pickletools.genops(data):
        if code.name in ("GLOBAL", "INST") and not _NAME.fullmatch(str(value)):
            raise Damaged("it names a class that cannot be one")
        if isinstance(value, str) and len(value) > _LONGEST_TEXT:
            raise Damaged(f"it has a text of {len(value)} characters")


def _script_state(root: Any, archive: _Archive) -> dict[str, Tensor]:
    """Tensors that a module and its modules hold, by dotted name: parameters, buffers and plain attributes."""
    state: dict[str, Tensor] = {}
    copied: dict[str, Tensor] = {}
    visits = itertools.count()

    def walk(held: Any, prefix: str, depth: int) -> None:
        # the same module may stand in many places, and so in more than there is time for
        if depth > _DEEPEST or next(visits) > _MODULES:
            raise ValueError("its modules are nested too deeply")
        fields = held.state if isinstance(held, _StandIn) else None
        if not isinstance(fields, Mapping):
            where = prefix.removesuffix(".") or "the module"
            raise pickle.UnpicklingError(f"GLOBAL {where} is rebuilt by code of its own")
        for name, value in fields.items():
            if not isinstance(value, _StandIn):
                continue
            if value.path == "torch._utils._rebuild_tensor_v2":
                state[f"{prefix}{name}"] = _tensor(value.args, archive, copied)
            elif value.path.startswith("__torch__."):
                walk(value, f"{prefix}{name}.", depth + 1)

    walk(root, "", 0)
    return state


def _tensor(args: Sequence[Any], archive: _Archive, copied: dict[str, Tensor]) -> Tensor:
    storage, offset, shape, stride = args[:4]
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("a tensor is not what torch writes")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if 0 not in shape and last >= storage.count:
        raise ValueError(f"a tensor of shape {list(shape)} reaches beyond its storage")
    if storage.key not in copied:
        data = bytearray(archive.read(f"data/{storage.key}"))[: storage.count * storage.dtype.itemsize]
        copied[storage.key] = (
            torch.frombuffer(data, dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)
        )
    return copied[storage.key].as_strided(shape, stride, offset)
