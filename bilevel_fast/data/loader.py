"""Batches made ahead, by a thread, and on the device when the step wants them; of several processes, each its share.

Reading latents, encoding captions and drawing noise take the CPU a few milliseconds; the copies go from pinned memory,
over a stream of their own. A step that finds its batch ready waits for neither. A recorded step reads its batch where
the recorded one lay: `graphs.py` copies it there, on the device.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Self

import torch
from torch import Tensor

from bilevel_fast.base.devices import Ranks
from bilevel_fast.base.errors import UserError
from bilevel_fast.data.batch import Batch
from bilevel_fast.data.batches import Batches

AHEAD = 2  # batches: one that is being made and one that is being copied


class RankBatches:
    """One process's rows of every batch: a pure function of (step, rank, world), so nothing is kept for a resume.

    Together the processes have the rows of the batch that one process would have, each with the same random numbers.
    """

    def __init__(self, batches: Batches, ranks: Ranks) -> None:
        """Set up.

        Args:
            batches: Of all processes together.
            ranks: Which process this is.

        Raises:
            UserError: The processes would have different numbers of rows.
        """
        if batches.batch_size % ranks.world:
            raise UserError(f"a batch of {batches.batch_size} cannot be shared evenly by {ranks.world} processes")
        self._batches, self._ranks = batches, ranks

    def __call__(self, step: int) -> Batch:
        """This process's share of the batch of a step."""
        size = self._batches.batch_size
        return self._batches.at(self._ranks.share(range(step * size, (step + 1) * size)))


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
