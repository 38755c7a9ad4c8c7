"""The phases of a training step, by name: time, FLOPs and bytes are counted by phase.

    with phase("teacher"):
        ...

Entering one costs a microsecond. While `annotate(True)`, a phase is also a `record_function` range for torch.profiler,
named `room/teacher` (traces and profiles call a phase a room), and an NVTX range where there is CUDA.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("data", "diffusion", "teacher", "student", "losses", "backward", "optimizer")

_inside: list[str] = []
_annotated = False


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Within, the step is in the phase `name`, one of `PHASES`; phases nest, and the innermost counts."""
    assert name in PHASES, f"{name!r} is no phase"
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
    """The innermost phase that the step is in; None outside."""
    return _inside[-1] if _inside else None


def annotate(on: bool) -> None:
    """Turn the ranges on or off, for the whole process."""
    global _annotated
    _annotated = on
