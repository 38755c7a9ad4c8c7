"""One level's optimizer: warm-up counted in its own steps, and steps with a non-finite gradient skipped.

Both levels move the same parameters, each with its own AdamW moments (as in the released trainer; arXiv:2412.15341,
Algorithm 1 with shared variables).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_fast import native
from bilevel_fast.providers import choose

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW without weight decay, whose arithmetic is native code where that wins.

    State and state dict are torch's own: the first step is always torch's, which creates them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        super().__init__(parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
        self._trained: native.Trained | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        (group,) = self.param_groups
        parameters = [p for p in group["params"] if p.grad is not None]
        states = [self.state[p] for p in parameters]
        if not self._is_native(parameters, states):
            super().step()
            return
        trained = self._list(parameters, states)
        found_inf = getattr(self, "found_inf", None)
        skip = found_inf is not None and bool(found_inf)  # a CPU tensor: nobody waits for a device
        beta1, beta2 = group["betas"]
        settings = native.AdamW(beta1, beta2, group["eps"], group["weight_decay"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        settings.step(trained, gradients, group["lr"], int(states[0]["step"]) + 1, skip=skip)
        if not skip:
            torch._foreach_add_([state["step"] for state in states], 1)  # pyright: ignore[reportPrivateImportUsage]

    def _is_native(self, parameters: list[nn.Parameter], states: list[dict[str, Tensor]]) -> bool:
        """Whether native code takes these: fp32 on the CPU, all at the same step."""
        if not parameters or not all(states) or len({float(state["step"]) for state in states}) != 1:
            return False
        able = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters)
        numel = sum(p.numel() for p in parameters)
        return choose("adamw_ema", parameters[0].device, numel, *["native"] * able) == "native"

    def _list(self, parameters: list[nn.Parameter], states: list[dict[str, Tensor]]) -> native.Trained:
        """The same list as long as it is of the same tensors: it remembers that it has been checked."""
        lists = (parameters, [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states])
        held = self._trained and (self._trained.parameters, self._trained.exp_avgs, self._trained.exp_avg_sqs)
        if not held or any(list(map(id, a)) != list(map(id, b)) for a, b in zip(lists, held, strict=True)):
            self._trained = native.Trained(*lists)
        assert self._trained is not None
        return self._trained


class LevelOptimizer:
    """Wraps a fused torch optimizer.

    The decision to skip is taken on the device: the fused kernels leave parameters and moments alone where
    `found_inf` is set, so no step waits for the host.

    Args:
        parameters: What is trained.
        lr: Learning rate after the warm-up.
        warmup: Steps of linear warm-up from 0: step n runs at lr * min(1, n / warmup).
        clip_norm: Gradients are scaled down to this global norm; None leaves them.
        make: Builds the torch optimizer, which must be fused; `AdamW` if None.
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
        self.inner = (make or AdamW)(self.parameters)
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
