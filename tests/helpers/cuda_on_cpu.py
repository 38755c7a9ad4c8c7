"""csrc/*.cu compiled for the CPU (see tests/ops/native), with the functions of `bilevel_fast.ops.native._cuda`."""

import ctypes
import re
import subprocess
from pathlib import Path

TESTS = Path(__file__).parents[1]
SHIM, SOURCES = TESTS / "ops/native/cuda_on_cpu", TESTS.parent / "csrc"


class OnCpu:
    """Built in a folder; tensors are then addresses of CPU memory. Devices and streams are ignored."""

    def __init__(self, folder, compiler):
        for source in SOURCES.glob("*.cu*"):
            launches = r"(\w+(?:<\w+>)?)<<<(.+?), kThreads, 0, stream>>>\((.*?)\);"
            text = re.sub(launches, r"launch(\2, kThreads, [&] { \1(\3); });", source.read_text(), flags=re.S)
            assert "<<<" not in text, f"{source.name} launches a kernel in a way that is not understood here"
            text = re.sub(r"#include <cuda_\w+\.h>", "", text)
            suffix = ".cpp" if source.suffix == ".cu" else ".cuh"
            (folder / source.name).with_suffix(suffix).write_text('#include "cuda_on_cpu.hpp"\n' + text)
        library = folder / "cuda_on_cpu.so"
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-pthread", "-shared", "-fPIC"]
        includes = [f"-I{path}" for path in (folder, SHIM, SOURCES)]
        sources = [*folder.glob("*.cpp"), SHIM / "calls.cpp"]
        subprocess.run([compiler, *flags, *includes, "-o", library, *sources], check=True)
        self.library = ctypes.CDLL(str(library))

    def adamw_ema(self, *arguments):
        *lists, counts = arguments[:7]
        settings, scalars = arguments[7:12], arguments[12:16]
        self.library.adamw_ema_run(
            *(*map(_addresses, lists), _counts(counts), len(counts)),
            *((ctypes.c_double * 5)(*settings), *map(ctypes.c_void_p, scalars)),
        )


def _addresses(values):
    return (ctypes.c_void_p * len(values))(*values) if values else None


def _counts(values):
    return (ctypes.c_int64 * len(values))(*values)
