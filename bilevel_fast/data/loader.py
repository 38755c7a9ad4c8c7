"""Batches made ahead, by a thread, and on the device when the step wants them.

Reading latents, encoding captions and drawing noise take the CPU a few milliseconds; the copies go over a stream of
their own. A step that finds its batch ready waits for neither.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Self

import torch
from torch import Tensor

from bilevel_fast.data.batches import Batch

AHEAD = 2  # batches: one that is being made and one that is being copied


class Loader:
    """Brings the batches of a level to a device. Steps are asked for in order, or the queue starts anew.

    With `with`, or after `close`, no thread is left behind. On the CPU there is none at all: it would only compete.

    Args:
        batches: Makes the batch of a step; called from one other thread where the device is a GPU.
        device: Where the batch is wanted.
        seed, timesteps: What `Batch.drawn` draws noise and timesteps with.
    """

    def __init__(self, batches: Callable[[int], Batch], device: torch.device, seed: int, timesteps: int):
        self._batches, self._device = batches, device
        self._draw = partial(Batch.drawn, seed=seed, timesteps=timesteps)
        self._queue: deque[tuple[int, Future[tuple[Batch, torch.cuda.Event]]]] = deque()
        self._thread = ThreadPoolExecutor(1, "loader") if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> Batch:
        """The batch of a step; an error of the thread that made it is raised here."""
        if self._thread is None:
            return self._draw(self._batches(step)).map(lambda x: x.to(self._device))
        if not self._queue or self._queue[0][0] != step:
            self._queue.clear()
        while len(self._queue) <= AHEAD:
            ahead = step + len(self._queue)
            self._queue.append((ahead, self._thread.submit(self._make, ahead)))
        batch, ready = self._queue.popleft()[1].result()
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
