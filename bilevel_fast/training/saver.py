"""Checkpoints of a run: of a GPU, or of several ranks, written and hashed by a thread while training goes on.

    with Saver(folder, snapshots_for(flat)) as saver:
        saver.save(step, tensors, optimizers, state)        # returns when the copies to the host are under way
        saver.wait()                                        # returns when the checkpoint is whole on the disk

A GPU's state is copied to pinned host memory, in order with the steps on their stream: the host goes on at once, and
the next step, which moves the weights, begins when they are copied (0.5 s for the 14 GB of SD 2.1 at 25 GB/s). A stream
of its own would win nothing: a recorded step cannot wait half-way. What several ranks gather for the first one is a
copy already. What one rank has on the CPU could only be copied within the memory that it fills, so there nothing is
copied and training waits.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from bilevel_fast.training import checkpoint
from bilevel_fast.training.parameters import FlatParameters

_log = logging.getLogger(__name__)

Snapshot = Callable[[list[Tensor]], tuple[list[Tensor], Callable[[], object]]]
"""Tensors -> copies of them on the host, and what waits until they hold what the tensors held at the call. The copies
may lie where those of the call before lay."""


class Pinned:
    """The snapshot of a GPU: into pinned host buffers, one for each storage, made at the first call and used again.

    Nothing is made on the device. torch rounds a pinned buffer up to a power of two.

    Args:
        device: A CUDA device; on another the copies are done when the call returns, which a test wants.
    """

    def __init__(self, device: torch.device):
        self.device, self._buffers = device, list[Tensor]()

    @torch.no_grad()
    def __call__(self, tensors: list[Tensor]) -> tuple[list[Tensor], Callable[[], object]]:
        on_gpu = self.device.type == "cuda"
        numbers, copies = dict[int, int](), list[Tensor]()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if (number := numbers.setdefault(storage._cdata, len(numbers))) == len(self._buffers):
                self._buffers.append(torch.empty(0, dtype=torch.uint8))
            if self._buffers[number].numel() != storage.nbytes():
                self._buffers[number] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_gpu)
            place = (tensor.storage_offset(), tensor.shape, tensor.stride())
            copies.append(torch.empty(0, dtype=tensor.dtype).set_(self._buffers[number].untyped_storage(), *place))
        for number, tensor in {numbers[t.untyped_storage()._cdata]: t for t in tensors}.items():
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
            self._buffers[number].copy_(whole, non_blocking=True)
        if not on_gpu:
            return copies, lambda: None
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))
        return copies, copied.synchronize


def as_it_is(tensors: list[Tensor]) -> tuple[list[Tensor], Callable[[], object]]:
    """The snapshot of a state that is a copy."""
    return tensors, lambda: None


def snapshots_for(flat: FlatParameters) -> Snapshot | None:
    """What a `Saver` of these parameters should take."""
    device = flat.master.device
    return as_it_is if flat.copies else Pinned(device) if device.type == "cuda" else None


class Saver:
    """Saves the checkpoints of one run, one at a time.

    Args:
        folder: Of the checkpoints.
        snapshot: Copies what is to be written, and a thread writes the copies; None writes before `save` returns.

    Leaving it waits for what is being written, and raises what went wrong with it, unless an exception is on its way.
    """

    def __init__(self, folder: Path, snapshot: Snapshot | None = None):
        self.folder, self.snapshot = folder, snapshot
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            _log.error("%s", error)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        optimizers: Mapping[str, Mapping[str, Any]],
        state: Mapping[str, Any],
    ) -> None:
        """`checkpoint.save`, of what the tensors hold now, after the save before it is done.

        Raises:
            UserError: The system refused to write this checkpoint or, with a snapshot, the one before it.
        """
        self.wait()
        if self.snapshot is None:
            checkpoint.save(self.folder, step, tensors, optimizers, state)
            return
        leaves, tree = tree_flatten((dict(tensors), dict(optimizers), dict(state)))
        places = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        copies, copied = self.snapshot([leaves[number] for number in places])
        for number, copy in zip(places, copies, strict=True):
            leaves[number] = copy
        self._thread = threading.Thread(target=self._write, args=(step, *tree_unflatten(leaves, tree), copied))
        self._thread.start()

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            UserError: The system refused to; said once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(self, step: int, tensors: Any, optimizers: Any, state: Any, copied: Callable[[], object]) -> None:
        try:
            copied()
            checkpoint.save(self.folder, step, tensors, optimizers, state)
        except BaseException as error:
            self._failure = error
