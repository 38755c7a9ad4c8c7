"""Pruning methods: functions (teacher, budget, calibration) -> Structure, by name."""

from collections.abc import Callable

from bilevel_fast.errors import UserError, nearest
from bilevel_fast.pruning.budget import Calibration, MacBudget
from bilevel_fast.pruning.magnitude import magnitude
from bilevel_fast.pruning.uniform import uniform
from bilevel_fast.structure import Structure
from bilevel_fast.unet import UNet

__all__ = ["METHODS", "Calibration", "MacBudget", "Method", "method"]

Method = Callable[[UNet, MacBudget, Calibration], Structure]
METHODS: dict[str, Method] = {"magnitude": magnitude, "uniform": uniform}


def method(name: str) -> Method:
    """Look up a pruning method.

    Raises:
        UserError: There is none of that name; the nearest are suggested.
    """
    if name not in METHODS:
        raise UserError(f"no pruning method {name!r}{nearest(name, METHODS)}")
    return METHODS[name]
