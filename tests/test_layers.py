"""Who may import whom: tests, benchmarks -> bilevel_fast -> bilevel_kernels -> torch, triton."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = sorted((ROOT / "bilevel_fast").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "bilevel_kernels").glob("*.py"))

# A training step needs these modules, and they need nothing but the four packages below.
CORE = [
    *("architecture", "structure", "macs", "unet", "ops", "providers", "randomness"),
    *("diffusion", "teacher", "losses", "optim", "bilevel"),
]

# Imported by the functions that need them: the engine starts fast, and runs where they are absent.
LAZY = ["diffusers", "transformers", "accelerate", "torchvision", "tensorboard", "matplotlib", "PIL"]
LAZY += ["nvidia", "webdataset", "open_clip", "nudenet", "torchmetrics", "torch_fidelity"]


def top_level_names(path: Path) -> Iterator[str]:
    """First component of every absolute import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module
            yield node.module.partition(".")[0]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def python(code: str, **env: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_kernels_stand_alone():
    """On a path of their own: the finder of an editable install is taken out, the engine cannot be found."""
    names = [f"bilevel_kernels.{path.stem}" for path in KERNELS if path.stem != "__init__"]
    plain = "from importlib.machinery import *; sys.meta_path[:] = [BuiltinImporter, FrozenImporter, PathFinder]"
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in ("bilevel_fast", *LAZY))
    python(f"import sys; {plain}; {blocked}; import {', '.join(names)}", PYTHONPATH="kernels")


def test_the_kernels_folder_is_not_a_package():
    """With an `__init__.py`, `kernels` would hide the Hugging Face package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_a_kernel_imports_torch_and_triton_only(path):
    allowed = {"torch", "triton", "bilevel_kernels", *sys.stdlib_module_names}
    assert set(top_level_names(path)) <= allowed


NATIVE = sorted(f"native/{path.stem}" for path in (ROOT / "bilevel_fast" / "native").glob("*.py"))


@pytest.mark.parametrize("module", CORE + NATIVE)
def test_the_core_imports_four_packages_only(module):
    path = ROOT / "bilevel_fast" / f"{module}.py"
    allowed = {"torch", "triton", "numpy", "safetensors", "bilevel_fast", "bilevel_kernels"}
    assert set(top_level_names(path)) <= allowed | sys.stdlib_module_names


@pytest.mark.parametrize("path", ENGINE, ids=relative)
def test_the_engine_knows_no_tests_and_no_benchmarks(path):
    assert not set(top_level_names(path)) & {"tests", "benchmarks", "conftest", "numerics", "pytest"}


def test_the_engine_imports_without_optional_packages():
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in LAZY)
    imports = "\n".join(f"importlib.import_module({module_name(path)!r})" for path in ENGINE)
    python(f"import importlib, sys; {blocked}\n{imports}")


def test_importing_the_package_is_cheap():
    python("import sys, bilevel_fast, bilevel_fast.base.errors; sys.exit('torch' in sys.modules)")
