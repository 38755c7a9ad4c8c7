"""A CUDA graph's rules, kept on the CPU: ops are recorded with the addresses they used, and replayed without Python.

What a graph cannot hold fails here as it does there: a number that Python reads from a tensor raises while recording,
one that Python has computed stays what it was, and what lies at another address than before is not seen. What ranks
send each other is sent anew, over gloo, and waited for at once.
"""

import torch
from torch import Tensor
from torch._C._distributed_c10d import Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")


class Recording(TorchDispatchMode):
    """Runs and keeps every op, and what its memory held before an op wrote to it for the first time."""

    def __init__(self):
        super().__init__()
        self.calls, self.alive, self.before = [], [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if func._schema.is_mutable or func.namespace == "c10d":  # whose schemas do not say what is written
            for x in tensors((args, kwargs)):
                storage = x.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        if func.namespace == "c10d":
            self.alive.append((args, out))
            self.calls.append((collective(func), args, kwargs, []))
            return out
        left = tensors(out)
        self.alive.append((args, kwargs, out))  # nobody else gets its memory
        inside = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        # a view is not replayed: what it looks at is written by others
        if func._schema.is_mutable or any(x.untyped_storage().data_ptr() not in inside for x in left):
            self.calls.append((func, args, kwargs, left))
        return out

    def undo(self):
        for storage, before in self.before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, left in self.calls:
            for mine, new in zip(left, tensors(func(*args, **kwargs)), strict=True):
                if mine.data_ptr() != new.data_ptr():
                    mine.copy_(new)


def collective(func):
    def call(*args, **kwargs):
        *_, work = out if isinstance(out := func(*args, **kwargs), tuple | list) else [out]
        Work.unbox(work).wait()
        return []

    return call


def tensors(tree):
    if isinstance(tree, Tensor):  # what most ops leave; to walk a tree takes as long as a small op
        return [tree]
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)]


def on_the_cpu(call):
    """What `graphs.Graphs` records with. Here the recorded call runs, as a captured one does not: that is undone."""
    recording = Recording()
    try:
        with recording:
            terms = call()
    finally:
        recording.undo()
    return recording.replay, terms
