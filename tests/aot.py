"""Compile kernels for cards that need not be here, and report what ptxas made of them.

Run as a script, since a process whose Triton interprets cannot compile: launches as JSON on stdin, reports as
JSON on stdout.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel, as its launcher would ask for it."""

    op: str  # module of bilevel_kernels
    kernel: str
    signature: dict[str, str]  # Triton type of every argument; "constexpr" for constants
    constants: dict[str, int]
    divisible: tuple[str, ...]  # arguments that are multiples of 16
    options: dict[str, int] = field(default_factory=dict)  # num_warps, num_stages
    sm: int = 90


@dataclass(frozen=True)
class Report:
    registers: int
    local_bytes: int  # stack and local memory of a thread: not zero when registers spill
    shared_bytes: int
    sass: str


def compile_all(launches: list[Launch]) -> list[Report]:
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps([asdict(launch) for launch in launches]),
            env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "PYTHONPATH": "kernels"},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return [Report(**report) for report in json.loads(done.stdout)]


def _compile(launch: Launch) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(launch.signature)
    attributes: Any = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible}
    kernel = getattr(importlib.import_module(f"bilevel_kernels.{launch.op}"), launch.kernel)
    source = ASTSource(kernel, launch.signature, launch.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", launch.sm, 32), options=launch.options)

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return Report(registers, stack + local, compiled.metadata.shared, sass)


if __name__ == "__main__":
    json.dump([asdict(_compile(Launch(**launch))) for launch in json.load(sys.stdin)], sys.stdout)
