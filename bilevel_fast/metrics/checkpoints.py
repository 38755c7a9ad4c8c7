"""Weight files of the networks that measure, as their authors publish them: read without running what is in them."""

import pickle
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.pickles import Damaged, load_plain
from bilevel_fast.base.tensors import read_tensors

# What training scripts leave in a checkpoint beside the weights: their flags, and learning rates as numpy scalars,
# pickled under the name that numpy's module had before 2.0 or has since. None of it runs anything.
_HARMLESS: list[Any] = [
    Namespace,
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),  # type: ignore[attr-defined]
]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a safetensors file, a file of `torch.save` (weights_only), or the state of a TorchScript archive.

    Returns:
        What it holds by name, on the CPU; for the first and the last: tensors.

    Raises:
        UserError: It is missing, cut short, of another kind, or a pickle with more than tensors and plain values:
            nothing in it is run, a TorchScript archive's code least of all.
    """
    if not path.is_file():
        raise UserError(f"weights {path} do not exist")
    if path.suffix == ".safetensors":
        return dict(read_tensors(path))
    try:
        held = load_plain(path, _HARMLESS)
    except pickle.UnpicklingError as error:
        kind = (
            "holds more than tensors and plain values, and is not loaded"
            if "GLOBAL" in str(error)
            else "is no weight file"
        )
        raise UserError(f"weights {path}: the file {kind}; wanted torch.save, TorchScript or safetensors") from error
    except Damaged as error:
        raise UserError(f"weights {path} are cut short or of another kind: {error}") from error
    if not isinstance(held, Mapping):
        raise UserError(f"weights {path}: wanted a state dict, found {type(held).__name__}")
    return dict(held)


def tensors_of(held: Mapping[str, Any], key: str | None = None) -> dict[str, Tensor]:
    """The tensors under `key`, or at the top if there is none, without the `module.` of data-parallel training."""
    inner = held.get(key, held) if key else held
    return {str(n).removeprefix("module."): value for n, value in inner.items() if isinstance(value, Tensor)}


def fit(module: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Load weights into the architecture that was meant, all of them.

    Args:
        module: Its parameters and buffers are overwritten.
        state: By name; counters of batches that a normalisation has seen may be missing.
        what: The architecture, for the message.

    Raises:
        UserError: A tensor is missing, left over, or of another shape; the first of each is named.
    """
    wanted = {n: t.shape for n, t in module.state_dict().items() if not n.endswith("num_batches_tracked")}
    found = {n: t.shape for n, t in state.items() if not n.endswith("num_batches_tracked")}
    lacks = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    other = [name for name in wanted if name in found and found[name] != wanted[name]]
    faults = [
        f"{len(names)} {verb}, first {names[0]!r}" for names, verb in ((lacks, "lack"), (extra, "too many")) if names
    ]
    if other:
        first = other[0]
        faults.append(f"{first!r} is {tuple(found[first])} and not {tuple(wanted[first])}")
    if faults:
        raise UserError(f"weights {path} are not of {what}: tensors: {'; '.join(faults)}")
    module.load_state_dict({name: tensor for name, tensor in state.items() if name in wanted}, strict=False)
