"""The optimizer step of `csrc/adamw_ema.hpp`: every tensor, its average and its bfloat16 copy in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bilevel_fast.ops.native import _C
from bilevel_fast.ops.native.pointers import check_apart, check_dense, flat_pointers


@dataclass(frozen=True, eq=False)
class Trained:
    """What a step writes: entry i of every list has one shape and one memory order.

    All are fp32 and dense, on one device; the copies are bfloat16.
    """

    parameters: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    emas: Sequence[Tensor] | None = None
    """Moving averages of the parameters, or None for none."""
    copies: Sequence[Tensor] | None = None
    """The parameters after the step, in bfloat16; or None."""
    _checked: list[object] = field(default_factory=list, init=False, repr=False)

    def pointers(self, device: torch.device) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
        """Addresses in the order of the fields; empty lists for None.

        Tensors are looked at when an address has changed since they were: models have hundreds of them.

        Raises:
            ValueError: A tensor is not as stated above.
        """
        lists = (self.parameters, self.exp_avgs, self.exp_avg_sqs, self.emas, self.copies)
        found = [[t.data_ptr() for t in tensors or ()] for tensors in lists]
        if self._checked != [device, *found]:
            check_dense("parameter", self.parameters)
            names = ("parameter", "exp_avg", "exp_avg_sq", "ema", "copy")
            for name, tensors in zip(names, lists, strict=True):
                if tensors is not None:
                    dtype = torch.bfloat16 if name == "copy" else torch.float32
                    flat_pointers(name, tensors, "parameter", self.parameters, dtype, device)
            check_apart(found)
            self._checked[:] = [device, *found]
        parameters, exp_avgs, exp_avg_sqs, emas, copies = found
        return parameters, exp_avgs, exp_avg_sqs, emas, copies

    @property
    def counts(self) -> list[int]:
        return [p.numel() for p in self.parameters]


@dataclass(frozen=True)
class AdamW:
    """torch.optim.AdamW, to the rounding of its steps, with a moving average of the parameters.

    Attributes:
        weight_decay: Decoupled: parameters shrink by lr * weight_decay of themselves.
        ema_decay: What a moving average keeps of itself in a step.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    ema_decay: float = 0.0

    def step(
        self,
        trained: Trained,
        gradients: Sequence[Tensor],
        lr: float,
        number: int,
        clip: float = 1.0,
        skip: bool = False,
    ) -> None:
        """Move every parameter by its gradient, on the CPU; autograd does not see it.

        Results are the same bits whatever torch.get_num_threads().

        Args:
            gradients: fp32, of the shapes and memory orders of the parameters.
            number: Of this step, 1 for the first.
            clip: What the gradients are multiplied by.
            skip: Write nothing at all.

        Raises:
            ValueError: A tensor is not as stated here and in `Trained`, or this is no step's number.
        """
        if number < 1:
            raise ValueError(f"step number {number}: the first is 1")
        cpu = torch.device("cpu")
        parameters, exp_avgs, exp_avg_sqs, emas, copies = trained.pointers(cpu)
        pointers = flat_pointers("gradient", gradients, "parameter", trained.parameters, torch.float32, cpu)
        if skip:
            return
        _C.adamw_ema(
            *(parameters, pointers, exp_avgs, exp_avg_sqs, emas, copies, trained.counts),
            *(lr, self.beta1, self.beta2, self.eps, self.weight_decay, clip, self.ema_decay, number),
            torch.get_num_threads(),
        )
