"""Every op once, forward and backward, on one small shape each: what compute-sanitizer looks at.

compute-sanitizer --tool memcheck python -m benchmarks.kernels.once --device cuda
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch

from benchmarks.kernels.cases import OPS, Case
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_kernels import adamw_ema_


@dataclass(frozen=True)
class Settings:
    """What runs once."""

    device: Literal["cpu", "cuda"] = "cuda"
    """Where to run; on the CPU in Triton's interpreter, with TRITON_INTERPRET=1."""


def calls(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Of every op, in every direction and with every kept ratio, the case with the fewest elements."""
    for op in OPS:
        if op == "adamw_ema":  # its cases are as large as the model
            yield "adamw_ema 100003", lambda: _adamw(device)
            continue
        cases: dict[tuple[str, ...], Case] = {}
        for case in import_module(f"benchmarks.kernels.cases.{op}").cases(1, device, torch.float16):
            words = case.name.split()
            kind = (words[-1], *(label for label in ("dense", "0.55") if label in words))
            if "0.80" not in words and case.numel <= cases.get(kind, case).numel:
                cases[kind] = case
        for case in cases.values():
            yield f"{op} {case.name}", lambda case=case: case.providers["triton"]()()


def _adamw(device: torch.device) -> None:
    p, m, v, ema = (torch.rand(100_003, device=device) for _ in range(4))
    gradient, copy = (torch.rand_like(p).half() for _ in range(2))
    one = torch.ones((), device=device)
    adamw_ema_(p, gradient, m, v, lr=1e-3 * one, step=one, ema=ema, copy=copy)


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.kernels.once", __doc__)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU")
    for name, call in calls(torch.device(settings.device)):
        call()
        print(name, flush=True)
    if settings.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
