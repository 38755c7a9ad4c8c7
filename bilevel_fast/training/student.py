"""A student on its way through both levels, as the run loop takes it."""

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bilevel_fast.ops.graphs import cuda_recorder
from bilevel_fast.scale.team import ALONE, Team
from bilevel_fast.training.graphs import Graphs
from bilevel_fast.training.levels import AnyLevel, Level, bilevel
from bilevel_fast.training.loop import Trainee
from bilevel_fast.training.upper import Suppression


class StudentTraining(Trainee):
    """Lower steps, with upper steps between them.

    Args:
        lower, upper: Both levels, over the same parameters; no upper steps without the second.
        every: Lower steps per upper step.
        device: Where they compute.
        graphs: Whether steps are recorded as CUDA graphs, on a GPU.
        team: Ranks that take the same steps.
    """

    name, step_name = "student", "lower step"

    def __init__(
        self,
        lower: Level,
        upper: AnyLevel | None,
        every: int,
        device: torch.device,
        graphs: bool,
        team: Team = ALONE,
    ):
        self.lower, self.upper, self.every, self.device, self.graphs = lower, upper, every, device, graphs
        self.team = team
        levels: list[AnyLevel] = [level for level in (lower, upper) if level is not None]
        self.flat, self.means = lower.optimizer.flat, [level.means for level in levels]
        self.optimizers = {level.name: level.optimizer for level in levels if isinstance(level, Level)}
        self.eraser = None if upper is None else upper.eraser
        self.pace = upper.pace if isinstance(upper, Level) else None
        gradient = upper.gradient if isinstance(upper, Level) else None
        self.envelope = gradient.envelope if isinstance(gradient, Suppression) else None

    def steps(self, start: int, end: int) -> Generator[object, None, None]:
        graphs = Graphs(cuda_recorder(self.device) if self.graphs else None, self.team)
        try:
            yield from bilevel(self.lower, self.upper, self.every, start, end, graphs)
        finally:
            graphs.forget()

    def numbers(self) -> dict[str, Tensor | float]:
        rates: dict[str, Tensor | float] = {f"{name}/lr": opt.next_lr for name, opt in self.optimizers.items()}
        return rates | ({"upper/every": self.pace.every} if self.pace else {})

    def lr_flag(self, name: str) -> str:
        return f"--{name}.lr"

    def upper_steps(self, step: int) -> int:
        if self.pace:
            return self.pace.upper_steps
        return step // self.every if self.upper is not None else 0

    def extras(self) -> dict[str, dict[str, Any]]:
        """The moving average, what solver and eraser cannot make again, and the pace, where there are such."""
        found: dict[str, dict[str, Any]] = {}
        if self.flat.average is not None:
            found["average"] = self.flat.state_dict(self.flat.average)
        if self.envelope is not None:
            found["envelope"] = self.flat.state_dict(self.envelope.v)
        own: dict[str, dict[str, Any]] = {}
        if self.eraser is not None and (state := self.eraser.state_dict()):
            own["eraser"] = state
        if self.pace is not None:
            own["pace"] = self.pace.state_dict()
        return found | tree_map_only(Tensor, self.flat.saved, own)

    def load_extras(self, found: Mapping[str, dict[str, Any]]) -> None:
        if self.flat.average is not None:
            self.flat.load_state_dict(found["average"], self.flat.average)
        if self.envelope is not None:
            self.flat.load_state_dict(found["envelope"], self.envelope.v)
        # masks that an edit finds on its way are in the checkpoint before they are in the edit
        if self.eraser is not None and ("eraser" in found or self.eraser.state_dict()):
            self.eraser.load_state_dict(found["eraser"])
        if self.pace is not None:
            self.pace.load_state_dict(found["pace"])
