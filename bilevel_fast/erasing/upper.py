"""The erasers of the upper level by name, as `train --upper.eraser` takes them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bilevel_fast.bilevel import Eraser
from bilevel_fast.config import Upper
from bilevel_fast.erasing.subsets import subset
from bilevel_fast.erasing.targets import Guidance
from bilevel_fast.errors import UserError, nearest
from bilevel_fast.parameters import FlatParameters
from bilevel_fast.unet import UNet


@dataclass(frozen=True)
class Kind:
    """How an eraser is made.

    Attributes:
        make: From the settings.
        reads: The settings in `OWN` that it reads; it is refused with others.
    """

    make: Callable[[Upper], Eraser]
    reads: tuple[str, ...] = ()


OWN = ("eta",)
"""Settings that only some erasers read."""

UPPER: dict[str, Kind] = {
    "guidance": Kind(lambda upper: Guidance(upper.eta), reads=("eta",)),
    "anchor-kd": Kind(lambda upper: Guidance(0.0)),
}


def make(upper: Upper) -> Eraser:
    """The eraser that the settings name; `check` has passed them."""
    return UPPER[upper.eraser].make(upper)


def holder(flat: FlatParameters, which: str) -> Callable[[], object]:
    """Zeroes the gradient of every parameter outside a subset (`subsets.subset`); does nothing for all of them.

    Raises:
        UserError: The subset holds nothing of this student.
    """
    assert isinstance(flat.module, UNet)
    moved = subset(flat.module, which)
    views = [view for name, view in flat.views(flat.gradient).items() if name not in moved]
    if not views:
        return lambda: None
    return partial(torch._foreach_zero_, views)  # pyright: ignore[reportPrivateImportUsage]  # one launch


def check(upper: Upper) -> None:
    """Refuse an eraser that does not exist, and settings that it would not read.

    Raises:
        UserError: Names the flag.
    """
    if upper.eraser not in UPPER:
        raise UserError(f"--upper.eraser {upper.eraser!r} does not exist{nearest(upper.eraser, UPPER)}")
    default = Upper()
    for name in OWN:
        value: Any = getattr(upper, name)
        if name not in UPPER[upper.eraser].reads and value != getattr(default, name):
            readers = ", ".join(other for other, kind in UPPER.items() if name in kind.reads)
            raise UserError(f"--upper.{name} is {value}, but eraser {upper.eraser!r} does not read it; {readers} does")
