"""One level's optimizer over the flat parameters: AdamW, warm-up in its own steps, non-finite gradients skipped.

Both levels move the same parameters, each with its own moments (as in the released trainer; arXiv:2412.15341,
Algorithm 1 with shared variables).

All that changes from step to step (counters, learning rate, clip factor, whether to skip) is a number on the device. So
no step waits for the host, and a CUDA graph of a step holds nothing that goes stale.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

import bilevel_kernels as triton_ops
from bilevel_fast.ops import native
from bilevel_fast.ops.native import cuda
from bilevel_fast.ops.providers import choose
from bilevel_fast.training.parameters import Apart, FlatParameters

BETAS, EPS = (0.9, 0.999), 1e-8


class AdamW:
    """AdamW (arXiv:1711.05101) without weight decay, and the moving average and bf16 copy that follow from it.

    Providers: `torch` (its fused kernel, then two passes for average and copy), and in one pass `native` (fp32 on the
    CPU), `triton`, and `cuda` (csrc, fp32).

    Args:
        flat: What is moved.
        decay: What the moving average keeps of itself in a step; read only where `flat` has one.
    """

    def __init__(self, flat: FlatParameters, decay: float = 0.0):
        self.flat, self.decay = flat, decay
        self.first, self.second = torch.zeros_like(flat.master), torch.zeros_like(flat.master)
        self.done = torch.zeros((), device=flat.master.device)  # steps that were not skipped
        emas = None if flat.average is None else [flat.average]
        self._settings = native.AdamW(*BETAS, EPS, weight_decay=0.0, ema_decay=decay)
        self._trained = native.Trained([flat.master], [self.first], [self.second], emas)
        if self.provider() == "triton":
            flat.place()

    def provider(self) -> str:
        # by all elements and not by this rank's: implementations differ in their last bits
        return choose("adamw_ema", self.flat.master.device, self.flat.size, *self._able())

    @torch.no_grad()
    def step(self, lr: Tensor, skip: Tensor, clip: Tensor | None) -> None:
        """Move the parameters by the gradient that `flat` holds, which may be scaled by `clip` in place.

        Args:
            lr, skip, clip: () fp32, on the device. Where `skip` is 1, no bit of anything changes.
        """
        own = {"native": self._native, "cuda": self._cuda, "triton": self._triton}
        own.get(self.provider(), self._torch)(lr, skip, clip)
        self.done += 1 - skip

    def step_apart(self, gradient: Apart, lr: Tensor, skip: Tensor, clip: Tensor | None) -> None:
        """The same by a gradient that is not in the buffer, which Triton's kernel alone can."""
        self._triton(lr, skip, clip, gradient)
        self.done += 1 - skip

    def _able(self) -> list[str]:
        flat = self.flat
        if flat.master.device.type == "cpu":
            on_cpu = ["native"] if flat.dtype == torch.float32 else []
            return on_cpu + ["triton"] * triton_ops.INTERPRETED
        return ["triton"] + ["cuda"] * (cuda.is_built() and flat.dtype == torch.float32)

    def _torch(self, lr: Tensor, skip: Tensor, clip: Tensor | None) -> None:
        flat = self.flat
        gradient = flat.gradient.float()
        if clip is not None:
            gradient.mul_(clip)
        # its own counter, which it moves or not as `skip` says
        buffers = ([flat.master], [gradient], [self.first], [self.second], [], [self.done.clone()])
        beta1, beta2 = BETAS
        adamw(
            *buffers, fused=True, found_inf=skip, amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=0.0,
            eps=EPS, maximize=False,
        )  # fmt: skip
        if flat.average is not None:
            flat.average.lerp_(flat.master, (1 - self.decay) * (1 - skip))
        if flat.rows is not flat.master:
            flat.rows.copy_(flat.master)

    def _triton(self, lr: Tensor, skip: Tensor, clip: Tensor | None, given: Apart | None = None) -> None:
        flat, (beta1, beta2) = self.flat, BETAS
        triton_ops.adamw_ema_(
            *(flat.master, given.buffer if given else flat.gradient, self.first, self.second),
            apart=given.large if given else (),
            places=given.places if given else None,
            lr=lr,
            step=self.done + 1,
            beta1=beta1,
            beta2=beta2,
            eps=EPS,
            clip=clip,
            skip=skip,
            ema=flat.average,
            ema_decay=self.decay,
            copy=None if flat.rows is flat.master else flat.rows,
        )

    def _native(self, lr: Tensor, skip: Tensor, clip: Tensor | None) -> None:
        # reads its numbers here and now: they are on the CPU, nobody waits for a device
        number, factor = int(self.done) + 1, 1.0 if clip is None else float(clip)
        self._settings.step(self._trained, [self.flat.gradient], float(lr), number, factor, skip=bool(skip))

    def _cuda(self, lr: Tensor, skip: Tensor, clip: Tensor | None) -> None:
        cuda.adamw_ema(self._settings, self._trained, [self.flat.gradient], lr, self.done + 1, clip, skip)

    def state_dict(self) -> dict[str, Any]:
        """Moments by the names of the parameters, without padding: they fit wherever the parameters fit.

        Of moments, views that change with the next step, unless `flat.copies`.
        """
        first, second = (self.flat.state_dict(moment) for moment in (self.first, self.second))
        return {"first": first, "second": second, "done": self.flat.saved(self.done)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.flat.load_state_dict(state["first"], self.first)
        self.flat.load_state_dict(state["second"], self.second)
        self.done.copy_(state["done"])


class LevelOptimizer:
    """When and how far: what is the same for every rule that moves parameters.

    Args:
        flat: What is trained; both levels share it.
        lr: Learning rate after the warm-up.
        warmup: Steps of linear warm-up from 0: step n runs at lr * min(1, n / warmup).
        clip_norm: Gradients are scaled down to this global norm; None leaves them.
        make: Makes the rule that moves the parameters.

    Attributes:
        held: () fp32 on the device: where it is 1, a step moves nothing; None where nobody holds it.
    """

    def __init__(
        self,
        flat: FlatParameters,
        lr: float,
        warmup: int,
        clip_norm: float | None = None,
        make: Callable[[FlatParameters], AdamW] = AdamW,
    ):
        self.flat, self.rule = flat, make(flat)
        self.lr, self.warmup, self.clip_norm = lr, warmup, clip_norm
        self.steps, self.bad_in_a_row = (torch.zeros((), device=flat.master.device) for _ in range(2))
        self.held: Tensor | None = None

    @property
    def next_lr(self) -> Tensor:
        """(), on the device."""
        return self.lr * ((self.steps / self.warmup).clamp(max=1.0) if self.warmup else torch.ones_like(self.steps))

    def step(self) -> Tensor:
        """Apply the gradient; returns its global norm before clipping, () fp32, on the device."""
        # a rule of its own reads the buffer
        apart = self.flat.apart() if type(self.rule) is AdamW and self.rule.provider() == "triton" else None
        norm = apart.norm() if apart else self.flat.norm()
        bad = (~norm.isfinite()).float()
        clip = None if self.clip_norm is None else (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        skip = bad if self.held is None else torch.maximum(bad, self.held)
        if apart:
            self.rule.step_apart(apart, self.next_lr, skip, clip)
        else:
            self.rule.step(self.next_lr, skip, clip)
        self.flat.moved()
        # in place: a CUDA graph that holds this step moves the same counters
        self.bad_in_a_row.add_(1).mul_(bad)
        self.steps.add_(1)
        return norm

    def state_dict(self) -> dict[str, Any]:
        steps, bad = self.flat.saved(self.steps), self.flat.saved(self.bad_in_a_row)
        return {"rule": self.rule.state_dict(), "steps": steps, "bad_in_a_row": bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rule.load_state_dict(state["rule"])
        self.steps.copy_(state["steps"])
        self.bad_in_a_row.copy_(state["bad_in_a_row"])
