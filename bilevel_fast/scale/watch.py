"""Who of the ranks is gone: a thread of each that says that it lives, and ends its process when another does not.

Every rank keeps a word in the store that all of them share: a number that goes up every second while it lives, `done`
when it has left in good order, `failed` and a reason when it ends with an error. A rank whose number stands still for
`LIMIT` seconds is killed, stopped, or cut off; `PATIENCE` seconds are enough for one whose own collective has failed. A
collective that waits for it would wait for ever, or raise something that does not say for whom. So the thread says it,
in one line, by the lowest rank that is still there, and ends the process: nothing is left to save but what the next
start reads from the last checkpoint. A GPU that does not end a step (`overdue`) is an end as well.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

from bilevel_fast.scale.overdue import Overdue

EVERY, LIMIT = 1.0, 10.0
"""Seconds between two signs of life, and after which silence is taken for an end."""
PATIENCE = 3.0
"""Seconds that ranks which fail at the same time have to say so by themselves."""


class Store(Protocol):
    """What is used of torch.distributed's stores."""

    def set(self, key: str, value: str, /) -> None: ...

    def multi_get(self, keys: list[str], /) -> list[bytes]: ...


def say_and_leave(line: str | None) -> None:
    """End the process at once; what may hang, threads and destructors, is not asked."""
    if line is not None:
        print(f"error: {line}", file=sys.stderr, flush=True)
    os._exit(2)


class Watch:
    """Sees to it that no rank waits for one that is gone.

    Args:
        store: Shared by all ranks; every one has called `beat` before any of them calls `look`.
        rank, world: Which of how many.
        names: Of the ranks, for the line: where each runs.
        clock, end: Replaced by tests.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        names: list[str],
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[str | None], None] = say_and_leave,
    ):
        self.store, self.rank, self.world, self.names = store, rank, world, names
        self._clock, self._end = clock, end
        self._beats, self._looks, self._word, self._limit = 0, 0, "", LIMIT
        self._last: list[bytes] = [b""] * world
        self._since, self._answered = [clock()] * world, clock()
        self.overdue = Overdue(clock)
        self._stopped = threading.Event()
        jobs = (self._run, self._guard)
        self._threads = [threading.Thread(target=job, name="watch", daemon=True) for job in jobs]

    def start(self) -> None:
        self._answered = self._clock()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def hurry(self) -> None:
        """A collective has failed: that is not a rank that is only slow."""
        self._limit = PATIENCE

    def wait(self, seconds: float) -> None:
        """Until as many seconds have passed, and as many looks: a busy machine may not let the watch have one."""
        until, looks = self._clock() + seconds, self._looks + round(seconds / EVERY)
        while self._clock() < until or (self._looks < looks and self._clock() < until + LIMIT):
            time.sleep(0.1)

    def beat(self) -> None:
        """Say that this rank lives, or what it has said last."""
        self._beats += 1
        self.store.set(_key(self.rank), self._word or str(self._beats))

    def say(self, word: str, reason: str = "") -> None:
        """`done` or `failed`, for good."""
        self._word = json.dumps([word, reason])
        self.store.set(_key(self.rank), self._word)

    def heard(self) -> list[tuple[str, str] | None]:
        """What each rank has said for good: (`done` or `failed`, reason), or None."""
        words = self.store.multi_get([_key(rank) for rank in range(self.world)])
        said = [json.loads(word) if word.startswith(b"[") else None for word in words]
        return [None if found is None else (found[0], found[1]) for found in said]

    def look(self) -> None:
        """Compare what all say with what they said before, and end the process if one of them is gone."""
        self._looks += 1
        try:
            self.beat()
            words = self.store.multi_get([_key(rank) for rank in range(self.world)])
        except RuntimeError:
            if self._last[0].startswith(b'["failed'):
                self._end(None)
            elif self._clock() - self._answered >= PATIENCE:
                self._end(self._lost())
            return
        now = self._answered = self._clock()
        for rank, word in enumerate(words):
            if word != self._last[rank]:
                self._last[rank], self._since[rank] = word, now
        silent = [now - since for since in self._since]
        failed = [word.startswith(b'["failed') for word in self._last]
        done = [word.startswith(b'["done') for word in self._last]
        gone = [
            r != self.rank and not done[r] and silent[r] > (PATIENCE if failed[r] else self._limit)
            for r in range(self.world)
        ]
        if not any(gone):
            return
        first = max((r for r in range(self.world) if gone[r]), key=lambda r: silent[r])
        line = (
            f"rank {first}, on {self.names[first]}, is gone: not a word for {silent[first]:.0f} s; go on with --resume"
        )
        speaks = not failed[first] and all(gone[: self.rank])
        self._end(line if speaks else None)

    def guard(self) -> None:
        """End the process if the store has not answered for too long: who hosts it is stopped, and `look` waits."""
        if self._clock() - self._answered > LIMIT:
            self._end(self._lost())

    def wait_for_device(self) -> None:
        """End the process if its GPU does not end a step: it may wait for ranks that are there, and never come."""
        try:
            seconds = self.overdue.seconds()
        except RuntimeError:  # the device has failed: who waits for it is told, and this thread must go on
            return
        if seconds is not None:
            where = f"rank {self.rank}, on {self.names[self.rank]}"
            self._end(f"{where}: its GPU has been at one step for {seconds:.0f} s; go on with --resume")

    def _lost(self) -> str | None:
        """What rank 1 says of a store that is gone: nobody can say who is left."""
        if self.rank != 1:
            return None
        return f"rank 0, on {self.names[0]}, is gone, or the process that started it; go on with --resume"

    def _run(self) -> None:
        while not self._stopped.wait(EVERY):
            self.look()
            self.wait_for_device()

    def _guard(self) -> None:
        while not self._stopped.wait(EVERY):
            self.guard()


def _key(rank: int) -> str:
    return f"watch/{rank}"
