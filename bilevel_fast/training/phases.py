"""The rooms of a training step, by name: where time, FLOPs and bytes are told apart.

    with room("teacher"):
        ...

Entering one costs a microsecond. While `annotate(True)`, it is also a `record_function` range for torch.profiler, named
`room/teacher`, and an NVTX range where there is CUDA.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ROOMS = ("data", "diffusion", "teacher", "student", "losses", "backward", "optimizer")

_inside: list[str] = []
_annotated = False


@contextmanager
def room(name: str) -> Iterator[None]:
    """Be in the room `name`, one of `ROOMS`; rooms nest, and the innermost counts."""
    assert name in ROOMS, f"{name!r} is no room"
    _inside.append(name)
    try:
        if not _annotated:
            yield
            return
        with torch.profiler.record_function(f"room/{name}"):
            if torch.cuda.is_available():
                with torch.cuda.nvtx.range(name):
                    yield
            else:
                yield
    finally:
        _inside.pop()


def current() -> str | None:
    """The innermost room that the step is in; None outside."""
    return _inside[-1] if _inside else None


def annotate(on: bool) -> None:
    """Turn the ranges on or off, for the whole process."""
    global _annotated
    _annotated = on
