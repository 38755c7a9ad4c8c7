"""Who may import whom: tests, benchmarks -> bilevel_fast -> bilevel_kernels -> torch, triton; the engine by ORDER."""

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = [ROOT / "bilevel_fast" / "exporting" / "pruned_unet.py"]  # copied into what is exported; nothing imports it
ENGINE = sorted(path for path in (ROOT / "bilevel_fast").rglob("*.py") if path not in SHIPPED)
KERNELS = sorted((ROOT / "kernels" / "bilevel_kernels").glob("*.py"))

# A package imports from those before it only; packages on one line do not import each other.
ORDER = [
    *(["base"], ["scale"], ["ops"], ["models"], ["sampling"], ["data"], ["training"]),
    *(["profiling", "metrics"], ["erasing", "pruning", "exporting", "attacking"], ["worlds"], ["runs"]),
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
ENTRY_POINTS = {
    "train",
    "prune",
    "erase",
    "attack",
    "prepare",
    "sample",
    "evaluate",
    "reproduce",
    "profile",
    "convert",
    "export",
    "doctor",
    "completion",
    "__main__",
    "cli",
    "api",
    "__init__",
}

# What each package imports besides these; "" are the entry points.
EVERYWHERE = {"torch", "numpy", "safetensors", "bilevel_fast", "bilevel_kernels", *sys.stdlib_module_names}
ALSO = {
    "": {"tyro"},
    "base": {"tyro", "tqdm"},
    "models": {"diffusers"},
    "sampling": {"PIL"},
    "data": {"tyro", "tqdm", "PIL"},
    "training": {"tqdm"},
    "profiling": {"matplotlib"},
    "metrics": {"PIL", "open_clip"},
    "worlds": {"tyro", "PIL"},
    "runs": {"tyro", "matplotlib"},
}

# Imported by the functions that need them: the engine starts fast, and runs where they are absent.
LAZY = ["diffusers", "transformers", "accelerate", "torchvision", "tensorboard", "matplotlib", "PIL"]
LAZY += [
    "onnx",
    "onnxscript",
    "onnxruntime",
    "huggingface_hub",
    "peft",
    "wandb",
    "nvidia",
    "webdataset",
    "open_clip",
    "nudenet",
    "torchmetrics",
    "torch_fidelity",
]


def imports(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Dotted names; of `from a import b` it is `a.b`, whatever b is."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "relative imports hide where they lead"
            assert node.level == 0, "relative imports hide where they lead"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def everywhere(path: Path) -> set[str]:
    """Imports of a file, in functions and for type checkers as well."""
    return set(imports(ast.walk(ast.parse(path.read_text()))))


def roots(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(module: str) -> str:
    """Of `bilevel_fast.data.cache`: data; of an entry point: nothing."""
    name = module.split(".")[1] if "." in module else ""
    return name if name in LEVEL else ""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def python(code: str, **env: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_import_goes_up():
    wrong = []
    for path in ENGINE:
        here = package_of(module_name(path))
        for name in everywhere(path):
            if not name.startswith("bilevel_fast."):
                continue
            there = package_of(name)
            if here != there and LEVEL.get(there, len(ORDER)) >= LEVEL.get(here, len(ORDER)):
                wrong.append(f"{relative(path)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_circle():
    modules = {module_name(path): path for path in ENGINE}
    modules |= {module_name(path): path for path in (ROOT / "bilevel_fast").rglob("*.pyi")}
    graph = {
        module: {name if name in modules else name.rpartition(".")[0] for name in everywhere(path)} & set(modules)
        for module, path in modules.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_the_root_holds_the_entry_points():
    assert {path.stem for path in (ROOT / "bilevel_fast").glob("*.py")} == ENTRY_POINTS
    folders = {path.name for path in (ROOT / "bilevel_fast").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(LEVEL)


@pytest.mark.parametrize("folder", ["bilevel_fast", "kernels", "benchmarks", "tests", "csrc"])
def test_no_file_is_over_500_lines(folder):
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".cu", ".hpp", ".cuh")]
    assert files
    assert not [relative(path) for path in files if len(path.read_text().splitlines()) > 500]


@pytest.mark.parametrize("package", ["", *LEVEL])
def test_what_else_a_package_imports(package):
    """Optional packages in functions only."""
    for path in ENGINE:
        if package_of(module_name(path)) == package:
            assert roots(everywhere(path)) - EVERYWHERE <= ALSO.get(package, set()), relative(path)
            assert not roots(imports(ast.parse(path.read_text()).body)) & set(LAZY), relative(path)


def test_the_engine_knows_no_tests_and_no_benchmarks():
    helpers = {path.stem for path in (ROOT / "tests/helpers").glob("*.py")}
    for path in ENGINE:
        assert not roots(everywhere(path)) & {"tests", "benchmarks", "conftest", "pytest", *helpers}, relative(path)


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_a_kernel_imports_torch_and_triton_only(path):
    assert roots(everywhere(path)) <= {"torch", "triton", "bilevel_kernels", *sys.stdlib_module_names}


def test_kernels_stand_alone():
    """On a path of their own: the finder of an editable install is taken out, the engine cannot be found."""
    names = [f"bilevel_kernels.{path.stem}" for path in KERNELS if path.stem != "__init__"]
    plain = "from importlib.machinery import *; sys.meta_path[:] = [BuiltinImporter, FrozenImporter, PathFinder]"
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in ("bilevel_fast", *LAZY))
    python(f"import sys; {plain}; {blocked}; import {', '.join(names)}", PYTHONPATH="kernels")


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_what_is_shipped_with_a_model_needs_nothing_of_ours(path):
    assert roots(everywhere(path)) <= {"torch", "diffusers", *sys.stdlib_module_names}
    assert not [relative(other) for other in ENGINE if module_name(path) in everywhere(other)]


def test_the_kernels_folder_is_not_a_package():
    """With an `__init__.py`, `kernels` would hide the Hugging Face package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_engine_imports_without_optional_packages():
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in LAZY)
    modules = "\n".join(f"importlib.import_module({module_name(path)!r})" for path in ENGINE)
    python(f"import importlib, sys; {blocked}\n{modules}")


def test_importing_the_package_is_cheap():
    python("import sys, bilevel_fast, bilevel_fast.base.errors; sys.exit('torch' in sys.modules)")
