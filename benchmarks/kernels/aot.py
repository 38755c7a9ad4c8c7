"""Compile kernels for cards that need not be here, exactly as their launchers would, and read what ptxas made of them.

    python -m benchmarks.kernels.aot group_norm_silu      what every launch of an op compiles to

Inside `offline(sm)` a launch specialises and compiles its kernel for that target, and runs nothing. So tensors may be
on the CPU with contents that nobody looks at, and the signatures, alignment hints and configurations are those that the
op itself asks for. Triton's interpreter must be off: a process either interprets or compiles.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Card:
    """Limits of one SM (CUDA C++ Programming Guide, table of technical specifications per compute capability)."""

    warps: int
    blocks: int
    shared: int  # bytes
    block_shared: int  # bytes that one block may have
    registers: int = 65536


CARDS = {
    80: Card(warps=64, blocks=32, shared=164 << 10, block_shared=163 << 10),
    86: Card(warps=48, blocks=16, shared=100 << 10, block_shared=99 << 10),
    89: Card(warps=48, blocks=24, shared=100 << 10, block_shared=99 << 10),
    90: Card(warps=64, blocks=32, shared=228 << 10, block_shared=227 << 10),
    100: Card(warps=64, blocks=32, shared=228 << 10, block_shared=227 << 10),
    120: Card(warps=48, blocks=24, shared=100 << 10, block_shared=99 << 10),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one card."""

    kernel: str
    sm: int
    config: str  # compile-time constants, warps and stages
    registers: int
    spills: int  # bytes of stack and local memory of a thread
    shared: int  # bytes of a block
    occupancy: float  # resident warps of the most that an SM holds
    tensor_core: int | None  # instructions; None where they were not counted
    wide_copies: int | None  # instructions that load or copy 16 bytes
    double: int | None  # fp64 arithmetic instructions
    sass: str

    @property
    def fits(self) -> bool:
        return self.shared <= CARDS[self.sm].block_shared


class _Target:
    """Triton's driver, for a card that is only named."""

    def __init__(self, sm: int):
        self.sm = sm

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return self.sm  # kernels are cached by device: one for each target

    def get_current_stream(self, _: int | None = None) -> int:
        return 0


TENSOR_CORE = r"\b(?:HMMA|HGMMA|QGMMA|UTC\w*MMA)\b"  # from sm_80, sm_90 and sm_100 on

Wanted = Callable[[str, str], Literal["nothing", "resources", "instructions"]]  # of a kernel and its config


@contextmanager
def offline(sm: int, wanted: Wanted = lambda kernel, config: "instructions") -> Iterator[list[Compiled]]:
    """Launches in here are compiled for `sm`, not run; each new kernel is appended to the list.

    A launch of which `wanted` says "nothing" is not even compiled. One of which it says "resources" is not listed,
    which can take longer than to compile it, and its instructions are not counted.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: this process interprets kernels and cannot compile them")
    found: dict[Any, Compiled] = {}
    rows: list[Compiled] = []
    run, build, active = JITFunction.run, JITFunction._do_compile, driver._active

    def build_wanted(self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, *rest: Any) -> Any:
        config = _config(self.arg_names, constants, options.num_warps, options.num_stages)
        if wanted(self.__name__, config) == "nothing":
            return None
        return build(self, key, signature, device, constants, options, *rest)

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        # one that this process has compiled for others comes from its cache, wanted or not
        if kernel is not None and kernel.hash not in found and wanted(*_named(kernel)) != "nothing":
            found[kernel.hash] = _read(kernel, sm, wanted)
            rows.append(found[kernel.hash])
        return kernel

    driver.set_active(_Target(sm))  # pyright: ignore[reportArgumentType]  # the three methods that compiling calls
    JITFunction.run, JITFunction._do_compile = compile_only, cast(Any, build_wanted)
    try:
        yield rows
    finally:
        JITFunction.run, JITFunction._do_compile = run, build
        driver._active = active  # `reset_active` would look for a driver, and there may be none


def _config(names: list[str], constants: dict[tuple[int, ...], Any], warps: int, stages: int) -> str:
    named = {names[path[0]]: value for path, value in constants.items() if len(path) == 1}
    shown = " ".join(f"{name}={value}" for name, value in named.items() if name.isupper())
    return f"{shown} warps={warps} stages={stages}".strip()


def _named(kernel: Any) -> tuple[str, str]:
    meta = kernel.metadata
    return meta.name, _config(kernel.src.fn.arg_names, kernel.src.constants, meta.num_warps, meta.num_stages)


def _read(kernel: Any, sm: int, wanted: Wanted) -> Compiled:
    meta, (_, config) = kernel.metadata, _named(kernel)
    counted = wanted(meta.name, config) == "instructions"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [tool, "-res-usage", *["-sass"] * counted, file.name]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (
        int(found[1]) if (found := re.search(rf"\b{key}:(\d+)", sass)) else 0 for key in ("REG", "STACK", "LOCAL")
    )

    def count(pattern: str) -> int | None:
        return len(re.findall(pattern, sass)) if counted else None

    return Compiled(
        kernel=meta.name,
        sm=sm,
        config=config,
        registers=registers,
        spills=stack + local,
        shared=meta.shared,
        occupancy=_occupancy(CARDS[sm], meta.num_warps, registers, meta.shared),
        tensor_core=count(TENSOR_CORE),
        wide_copies=count(r"\b(?:LDG|LDGSTS)\.E\S*\.128|\bUTMALDG"),
        double=count(r"\bD(?:ADD|MUL|FMA|SETP)\b|\.F64\b"),
        sass=sass,
    )


@lru_cache
def _occupancy(card: Card, warps: int, registers: int, shared: int) -> float:
    per_warp = -(-registers * 32 // 256) * 256  # registers are given out in units of 256 per warp
    blocks = min(
        card.blocks,
        card.warps // warps,
        card.registers // (per_warp * warps) if per_warp else card.blocks,
        card.shared // (shared + 1024),  # the driver keeps 1 KiB of each block's for itself
    )
    return blocks * warps / card.warps


def spread(cases: list[Any], few: int | None) -> list[Any]:
    """So many of them, far from each other; every other one is at an odd place, where backward passes often are."""
    if few is None or len(cases) <= few:
        return cases
    places = ((number * len(cases) // few) | (number % 2) for number in range(few))
    return [cases[min(place, len(cases) - 1)] for place in places]


def compile_op(
    op: str,
    dtype: str,
    sm: int,
    skip: tuple[str, ...] = (),
    wanted: Wanted = lambda kernel, config: "instructions",
    batch: int = 2,
    few: int | None = None,
) -> list[tuple[str, Compiled]]:
    """(case, kernel) of every kernel that the benchmark cases of an op launch; each kernel once.

    Cases with one of the words of `skip` in their names are left out, and kernels of which nothing is `wanted`. Of the
    others only a `few` are taken where that is a number, see `spread`.
    """
    import importlib

    import torch

    cases = importlib.import_module(f"benchmarks.kernels.cases.{op}").cases(
        batch, torch.device("cpu"), getattr(torch, dtype)
    )
    cases = [case for case in cases if not set(skip) & set(case.name.split())]
    cases = spread(cases, few)
    rows: list[tuple[str, Compiled]] = []
    with offline(sm, wanted) as compiled:
        for case in cases:
            before = len(compiled)
            call: Callable[[], object] = case.providers["triton"]()
            call()
            rows += [(case.name, kernel) for kernel in compiled[before:]]
    return rows


def main() -> None:
    for op in sys.argv[1:]:
        for sm in CARDS:
            for case, k in compile_op(op, "bfloat16", sm):
                print(
                    f"sm_{sm} {k.kernel:32} {k.registers:3} reg {k.spills:4} B spilled {k.shared:6} B shared "
                    f"{k.occupancy:4.0%} {k.tensor_core:3} mma {k.wide_copies:3} x 16 B {k.double} f64  "
                    f"{case}  {k.config}"
                )


if __name__ == "__main__":
    main()
