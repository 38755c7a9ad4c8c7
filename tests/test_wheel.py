"""The wheel in dist/, installed where there is no checkout, does what it says: `make wheel` builds it first."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIST = ROOT / os.environ.get("WHEEL", "dist")
DRAW = ["--model", "runs/smoke/student", "--prompts", "a red star", "--seeds", "0", "--steps", "3", "--out", "grid.png"]
pytestmark = pytest.mark.skipif("WHEEL" not in os.environ, reason="two minutes of building: `make wheel`")


@pytest.fixture(scope="module")
def wheel() -> Path:
    (found,) = DIST.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def version(wheel) -> str:
    return wheel.name.split("-")[1]


@pytest.fixture(scope="module")
def place(wheel, tmp_path_factory) -> Path:
    """A new environment with the wheel in it, and an empty folder beside it.

    What the wheel depends on is not installed again: its path is added, in a way that runs no hook of an editable
    install.
    """
    root = tmp_path_factory.mktemp("elsewhere")
    venv.create(root / "venv", symlinks=True)
    (packages,) = (root / "venv" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n" + _elsewhere())
    pip = [sys.executable, "-m", "pip", "--python", str(root / "venv" / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    (root / "empty").mkdir()
    return root


def _elsewhere() -> str:
    """Where torch lies, should that be another folder than this environment's own."""
    import torch

    return f"{Path(torch.__file__).parents[1]}\n"


def run(place: Path, *command: str) -> str:
    program, *arguments = command
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "WHEEL")}
    env["HOME"] = str(place / "empty")
    line = [str(place / "venv" / "bin" / program), *arguments]
    done = subprocess.run(line, cwd=place / "empty", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    return done.stdout


def test_it_holds_what_it_needs_and_nothing_else(wheel, version):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    info = f"bilevel_fast-{version}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"bilevel_fast", "bilevel_kernels", info}
    assert f"{info}/licenses/LICENSE" in names
    assert any(name.startswith("bilevel_fast/ops/native/_C.") and name.endswith(".so") for name in names)
    for folder, package in ((ROOT, "bilevel_fast"), (ROOT / "kernels", "bilevel_kernels")):
        listed = subprocess.run(["git", "ls-files", package], cwd=folder, capture_output=True, text=True, check=True)
        missing = set(listed.stdout.splitlines()) - names
        assert not missing, missing


def test_the_sdist_says_its_version_and_whose_it_is(version):
    (sdist,) = DIST.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert sdist.name == f"bilevel_fast-{version}.tar.gz"
    assert {"PKG-INFO", "LICENSE", "constraints.txt", "csrc/bindings.cpp", "docs/wheel.md"} <= names


def test_all_of_it_is_imported_from_there(place, version):
    """The engine, the kernels, the native module and the weights; and no package that nobody asked for."""
    said = run(
        place, "python", "-c",
        "import sys, bilevel_fast, bilevel_kernels; from bilevel_fast import api; from bilevel_fast.ops import native\n"
        "from bilevel_fast.ops.native import _C\n"
        "print(bilevel_fast.__file__, bilevel_kernels.__file__, _C.__file__, api.load().path, sep='\\n')\n"
        "print(sorted({'nudenet', 'wandb', 'diffusers', 'peft'} & set(sys.modules)))",
    )  # fmt: skip
    *paths, asked = said.splitlines()
    assert len(paths) == 4
    assert all(Path(path).is_relative_to(place / "venv") for path in paths), paths
    assert asked == "[]"
    assert run(place, "bilevel-fast", "--version") == f"bilevel-fast {version}\n"


def test_a_run_in_an_empty_folder(place):
    said = run(place, "bilevel-fast", "train", "--preset", "smoke", "--device", "cpu")
    assert "concept_hit" in said
    run(place, "bilevel-fast", "sample", *DRAW)
    assert (place / "empty" / "grid.png").stat().st_size > 100
    assert {path.name for path in (place / "empty").iterdir()} - {".cache", ".triton", ".config"} == {
        "runs",
        "grid.png",
    }
