"""One level's optimizer: warm-up counted in its own steps, and steps with a non-finite gradient skipped.

Both levels move the same parameters, each with its own AdamW moments (as in the released trainer; arXiv:2412.15341,
Algorithm 1 with shared variables).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class LevelOptimizer:
    """Wraps a fused torch optimizer.

    The decision to skip is taken on the device: the fused kernels leave parameters and moments alone where
    `found_inf` is set, so no step waits for the host.

    Args:
        parameters: What is trained.
        lr: Learning rate after the warm-up.
        warmup: Steps of linear warm-up from 0: step n runs at lr * min(1, n / warmup).
        clip_norm: Gradients are scaled down to this global norm; None leaves them.
        make: Builds the torch optimizer; it must be fused.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        warmup: int,
        clip_norm: float | None = None,
        make: MakeOptimizer | None = None,
    ):
        self.parameters = list(parameters)
        self.lr, self.warmup, self.clip_norm = lr, warmup, clip_norm
        make = make or (lambda p: torch.optim.AdamW(p, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True))
        self.inner = make(self.parameters)
        self.steps = 0
        self.bad_in_a_row = torch.zeros((), device=self.parameters[0].device)

    @property
    def next_lr(self) -> float:
        return self.lr * (min(1.0, self.steps / self.warmup) if self.warmup else 1.0)

    def zero_grad(self) -> None:
        self.inner.zero_grad(set_to_none=True)

    def step(self) -> Tensor:
        """Apply the gradients; returns their global norm before clipping, (), on the device."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        bad = (~norm.isfinite()).float()
        self.bad_in_a_row = (self.bad_in_a_row + bad) * bad
        for group in self.inner.param_groups:
            group["lr"] = self.next_lr
        self.inner.found_inf = bad  # type: ignore[attr-defined]  # read by torch's fused kernels
        self.inner.grad_scale = None  # type: ignore[attr-defined]
        self.inner.step()
        self.steps += 1
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "steps": self.steps, "bad_in_a_row": self.bad_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        # the fused kernels walk parameters and moments in memory order: a moment must be laid out as its parameter
        for parameter, moments in self.inner.state.items():
            for name, value in moments.items():
                if value.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(value)
        self.steps = state["steps"]
        self.bad_in_a_row = state["bad_in_a_row"].to(self.bad_in_a_row.device)
