"""Batches made ahead, by a thread, and on the device when the step wants them.

Reading latents and drawing noise take the CPU a few milliseconds; copies go from pinned memory over a stream of the
loader's own, and a text encoder on the device runs there as well. A step that finds its batch ready waits for neither.
A recorded step reads its batch where the recorded one lay: `ops.graphs` copies it there, on the device.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from bilevel_fast.data.batch import Batch

T = TypeVar("T")

AHEAD = 2  # batches: one that is being made and one that is being copied


class Ahead(Generic[T]):
    """What `make` makes of a step, made ahead by one thread. Steps are asked for in order, or the queue starts anew.

    Args:
        make: Called from that thread alone, one step after the other.
    """

    def __init__(self, make: Callable[[int], T]):
        self._make = make
        self._queue: deque[tuple[int, Future[T]]] = deque()
        self._thread = ThreadPoolExecutor(1, "loader")

    def __call__(self, step: int) -> T:
        """What belongs to a step; an error of the thread that made it is raised here."""
        if not self._queue or self._queue[0][0] != step:
            self._queue.clear()
        while len(self._queue) <= AHEAD:
            ahead = step + len(self._queue)
            self._queue.append((ahead, self._thread.submit(self._make, ahead)))
        return self._queue.popleft()[1].result()

    def close(self) -> None:
        """Wait for what is being made, make nothing more, and leave no thread behind."""
        self._thread.shutdown(cancel_futures=True)


class Loader:
    """Brings the batches of a level to a device, made ahead where that is a GPU.

    With `with`, or after `close`, no thread is left behind. On the CPU there is none at all: it would only compete.

    Args:
        batches: Makes the batch of a step; called from one other thread where the device is a GPU.
        device: Where the batch is wanted.
        seed, timesteps: What `Batch.drawn` draws noise and timesteps with.
    """

    def __init__(self, batches: Callable[[int], Batch], device: torch.device, seed: int, timesteps: int):
        self._batches, self._device = batches, device
        self._draw = partial(Batch.drawn, seed=seed, timesteps=timesteps)
        self._ahead = Ahead(self._make) if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        if self._stream is not None:
            self._stream.synchronize()  # the next loader of the same batches reads text states that were made on it

    def __call__(self, step: int) -> Batch:
        """The batch of a step; an error of the thread that made it is raised here."""
        if self._ahead is None:
            return self._draw(self._batches(step)).map(lambda x: x.to(self._device))
        batch, ready = self._ahead(step)
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(ready)
        # made on another stream: its memory is not to be given away while this one reads it
        return batch.map(lambda x: (x.record_stream(stream), x)[1])

    def _make(self, step: int) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            batch = self._draw(self._batches(step)).map(self._copy)
            ready = torch.cuda.Event()
            ready.record()
        return batch, ready

    def _copy(self, x: Tensor) -> Tensor:
        return x.pin_memory().to(self._device, non_blocking=True) if x.device.type == "cpu" else x.to(self._device)
