"""Every op once, forward and backward, on one small shape each: what compute-sanitizer looks at.

compute-sanitizer --tool memcheck python -m benchmarks.once --device cuda
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch

from benchmarks.cases import OPS, Case
from bilevel_fast import errors, flags
from bilevel_fast.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Settings."""

    device: Literal["cpu", "cuda"] = "cuda"
    """Where to run; on the CPU in Triton's interpreter, with TRITON_INTERPRET=1."""


def smallest(device: torch.device) -> Iterator[Case]:
    """Of every op and every direction, the pruned case with the fewest elements."""
    for op in OPS:
        cases: dict[str, Case] = {}
        for case in import_module(f"benchmarks.cases.{op}").cases(1, device, torch.float16):
            direction = case.name.split()[-1]
            if "0.80" not in case.name and case.numel < cases.get(direction, case).numel + 1:
                cases[direction] = case
        yield from cases.values()


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.once", __doc__)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU")
    for case in smallest(torch.device(settings.device)):
        case.providers["triton"]()()
        print(case.op, case.name)
    if settings.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
