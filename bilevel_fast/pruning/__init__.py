"""Pruning methods by name: `METHODS` has a line for each.

    structure = METHODS["magnitude"](teacher, MacBudget(0.8, latent=64, text=77), calibration)
    student = teacher.cut(structure)

A method may try the teacher on the batches of `calibration_set`. CONTRIBUTING.md says how to add one.
"""

from collections.abc import Callable, Iterable
from inspect import Parameter, signature

from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.models.folder import ModelFolder
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning.bk_sdm import TINY, bk_sdm_base, bk_sdm_small
from bilevel_fast.pruning.budget import Budget, Calibration, MacBudget
from bilevel_fast.pruning.calibration import CalibrationSet, calibration_set
from bilevel_fast.pruning.initial import reinitialise
from bilevel_fast.pruning.latency import LatencyBudget, read_latencies
from bilevel_fast.pruning.layers import laptop
from bilevel_fast.pruning.learned import learned_gates
from bilevel_fast.pruning.magnitude import magnitude
from bilevel_fast.pruning.random import random
from bilevel_fast.pruning.sdxl_shapes import SHAPES, shape
from bilevel_fast.pruning.taylor import diff_pruning
from bilevel_fast.pruning.uniform import uniform

__all__ = [
    "FIXED",
    "METHODS",
    "Budget",
    "Calibration",
    "CalibrationSet",
    "LatencyBudget",
    "MacBudget",
    "Method",
    "calibration_set",
    "dense",
    "described",
    "method",
    "read_latencies",
    "reinitialise",
]

Method = Callable[[UNet, Budget, Calibration], Structure]
"""(dense teacher, budget, calibration batches) -> what the student keeps. The teacher is as before afterwards."""

METHODS: dict[str, Method] = {
    "magnitude": magnitude,
    "diff-pruning": diff_pruning,
    "gates": learned_gates,
    "laptop": laptop,
    "bk-sdm-base": bk_sdm_base,
    "bk-sdm-small": bk_sdm_small,
    **{name: shape(name) for name in SHAPES},
    "uniform": uniform,
    "random": random,
}
"""By the name that `prune` and `train --prune.method` take; `prune --help` shows the first line of a docstring."""

FIXED = ("bk-sdm-base", "bk-sdm-small", *SHAPES)
"""Methods that say themselves what is left, whatever the budget."""


def method(name: str, besides: Iterable[str] = ()) -> Method:
    """The pruning method of that name; `besides` are words that may have been meant, too.

    Raises:
        UserError: There is none of that name; the nearest are suggested.
    """
    if name == "bk-sdm-tiny":
        raise UserError(TINY)
    if name not in METHODS:
        raise UserError(f"no pruning method {name!r}{nearest(name, (*METHODS, *besides))}")
    return METHODS[name]


def dense(name: str, folder: ModelFolder) -> UNet:
    """The dense UNet as that method needs it: in memory where it is tried on batches, otherwise still in its file.

    A method whose `calibration` has a default does without trying.
    """
    tried = signature(METHODS[name]).parameters["calibration"].default is Parameter.empty
    return folder.unet(mapped=not tried)


def described() -> dict[str, str]:
    """One sentence about each method: the first line of its docstring."""
    return {name: (function.__doc__ or "").partition("\n")[0] for name, function in METHODS.items()}
