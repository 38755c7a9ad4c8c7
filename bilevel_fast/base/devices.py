"""Which of several processes this one is, as `torchrun` says it: RANK, WORLD_SIZE and LOCAL_RANK."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from bilevel_fast.base.errors import UserError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Ranks:
    """One process of `world`."""

    rank: int = 0
    world: int = 1
    local: int | None = None
    """Among the processes of this machine; None if nobody said."""
    restarts: int = 0
    """How often torchrun has started these processes again."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UserError(f"rank {self.rank} of {self.world} does not exist; ranks count from 0")

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> "Ranks":
        """Read RANK, WORLD_SIZE and LOCAL_RANK; without them this is the only process.

        Raises:
            UserError: One is no number, RANK and WORLD_SIZE are not both there, or there is no such rank.
        """
        found: dict[str, int] = {}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
            if name in variables:
                try:
                    found[name] = int(variables[name])
                except ValueError as error:
                    raise UserError(f"{name} is {variables[name]!r}, wanted a number") from error
        if ("RANK" in found) != ("WORLD_SIZE" in found):
            raise UserError("only one of RANK and WORLD_SIZE is set; wanted both, as torchrun sets them, or neither")
        restarts = found.get("TORCHELASTIC_RESTART_COUNT", 0)
        return cls(found.get("RANK", 0), found.get("WORLD_SIZE", 1), found.get("LOCAL_RANK"), restarts)

    def share(self, rows: Sequence[_T]) -> Sequence[_T]:
        """Rows rank, rank + world, ...: all ranks together have each row once."""
        return rows[self.rank :: self.world]

    def leaves(self, count: int) -> range:
        """Which of the `count` equal parts of a batch are this process's: as many as everybody's, side by side.

        Raises:
            UserError: So many processes cannot share them evenly.
        """
        each, left = divmod(count, self.world)
        if left or not each:
            raise UserError(
                f"--scale.leaves is {count}: wanted a multiple of {self.world}, the processes that share a batch"
            )
        return range(self.rank * each, (self.rank + 1) * each)

    def device(self, name: str) -> str:
        """`auto` of several processes on one machine is a GPU each."""
        import torch

        if name == "auto" and self.local is not None and torch.cuda.is_available():
            return f"cuda:{self.local}"
        return name


ONE = Ranks()
"""The only process."""


def pick_device(name: str) -> torch.device:
    """Resolve `auto`, and refuse what is not there. A GPU that is named becomes this thread's current one: Triton's
    kernels, and libraries that are not told, launch there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the networks compute in: for `auto`, bf16 on a GPU that has it in hardware (sm_80 and later), else fp32."""
    if precision == "auto":
        hardware = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if hardware else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on, besides the flags."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """Model name of the CPU and number of cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def ram() -> tuple[int, int]:
    """Bytes of memory of this machine that the process may use, and how many of them are free now.

    A limit of its control group counts; Linux says both.
    """
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    total, free = kib["MemTotal"] * 2**10, kib["MemAvailable"] * 2**10
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such group, or `max`
        return total, free
    return min(total, limit), min(free, max(limit - used, 0))


def no_cuda() -> str | None:
    """Why torch finds no CUDA device, in a few words; None if it finds one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built for the CPU alone"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides them all"
    if driver() is None:
        return "no NVIDIA driver is loaded"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "the driver knows none"


def driver() -> str | None:
    """Version of the NVIDIA driver that is loaded, or None."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def settle_libraries(device: torch.device) -> None:
    """Torch's global switches as training and its benchmarks want them on a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes do not change
        torch.set_float32_matmul_precision("high")
