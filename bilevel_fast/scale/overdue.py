"""Whether a GPU does what it was given: a collective that never ends says nothing when a CUDA graph has launched it.

NCCL's own watchdog knows of the calls that Python makes, and a replayed graph makes none (pytorch #103503). So an event
is left behind each step, and the thread that looks after the ranks (`watch`) asks which of them have come to pass. Time
that the host takes between steps, for a checkpoint or a picture, does not count.
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

LEAST, TIMES = 120.0, 10.0
"""A step is overdue after so many seconds, and so many times the longest before it."""


class Event(Protocol):
    """What is used of `torch.cuda.Event`."""

    def record(self) -> None: ...

    def query(self) -> bool: ...


class Overdue:
    """Steps that were given to a GPU and have not come to pass.

    Args:
        clock: Seconds, from any start.
        make: Makes an event.
    """

    def __init__(self, clock: Callable[[], float], make: Callable[[], Event] = torch.cuda.Event):
        self._clock, self._make = clock, make
        self._given = deque[tuple[Event, float]]()
        self._free = clock()
        self._longest = 0.0

    def given(self) -> None:
        """A step has been given to the GPU."""
        event = self._make()
        event.record()
        self._given.append((event, self._clock()))

    def seconds(self) -> float | None:
        """For how long the GPU has been at a step, if that is too long; None otherwise."""
        while self._given and self._given[0][0].query():
            self._longest = max(self._longest, self._at())
            self._given.popleft()
            self._free = self._clock()
        if not self._given or (at := self._at()) <= max(LEAST, TIMES * self._longest):
            return None
        return at

    def _at(self) -> float:
        return self._clock() - max(self._given[0][1], self._free)
