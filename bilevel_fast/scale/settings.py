"""Settings of a training on several processes; a module of its own, as a command line reads settings without torch."""

from dataclasses import dataclass
from typing import Literal

from bilevel_fast.base.errors import UserError, in_range

Reduction = Literal["tree", "ring"]
Parameters = Literal["flat", "fsdp"]


@dataclass(frozen=True)
class Scale:
    """Training on the processes that torchrun starts; their number is no setting, and changes no result. Not supported:
    a number of processes that changes while they run. Not measured: several GPUs, of any kind. See docs/scale.md."""

    leaves: int = 1
    """Equal parts of a batch, of both levels, that are computed one by one and added up: a multiple of the number of
    processes, which share them. The same leaves give the same weights on 1, 2, 4, ... processes."""
    reduction: Reduction = "tree"
    """How gradients are added up over processes: tree, in fp32 and in one order for any number of them; or ring, as the
    library likes it, with half the bytes between machines."""
    parameters: Parameters = "flat"
    """What each process holds of the weights that compute: flat, all of student and teacher; or fsdp, a part of both,
    and a layer while it computes, for networks that do not fit on a card. fsdp sends them anew in every pass, and
    changes results by rounding; not with every eraser."""

    @property
    def in_parts(self) -> bool:
        """Whether no process holds whole networks."""
        return self.parameters == "fsdp"

    def check(self, **batches: int) -> None:
        """Refuse leaves that batches, by the name of their level, do not consist of.

        Raises:
            UserError: Names the flag, and numbers that would do.
        """
        in_range("--scale.leaves", self.leaves, ">= 1", self.leaves >= 1)
        for level, batch in batches.items():
            if batch % self.leaves:
                fits = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
                raise UserError(
                    f"--scale.leaves is {self.leaves}: wanted a divisor of --{level}.batch {batch} ({fits})"
                )
