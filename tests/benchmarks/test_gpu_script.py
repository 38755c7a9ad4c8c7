"""The script for one GPU: its commands are ones that exist, nothing is begun too late, bad input is one line."""

import importlib.util
import os
import re
import shlex
import subprocess

import pytest

from benchmarks import ROOT
from benchmarks.kernels.cases import OPS
from bilevel_fast import profile
from bilevel_fast.base import flags


def script(out, *args, **environment):
    return subprocess.run(
        ["bash", ROOT / "benchmarks" / "gpu.sh", *args],
        env={**os.environ, **({"OUT": str(out)} if out else {}), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("tiny", [True, False])
def test_every_command_can_be_parsed(tmp_path, tiny):
    """The script runs with `echo` for Python; what it would have called is read as the called would read it."""
    done = script(tmp_path, "--device", "cpu", *["--tiny"] * tiny, PYTHON="echo", BUDGET="9999")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = [line.split()[1].rstrip(":") for line in lines]
    assert names[0] == "step", "the most important first"
    assert {"alignment", "unet", "roofline", "profile", "compile", "mixture"} < set(names)
    assert all(line.endswith("exit 0") for line in lines)
    seen = set()
    for name in names:
        _, module, *rest = shlex.split((tmp_path / f"{name}.txt").read_text())
        seen.add(module)
        if module == "bilevel_fast.profile":
            profile.parse(rest)
            continue
        settings = flags.parse(importlib.import_module(module).Settings, module, None, args=rest)
        assert getattr(settings, "tiny", tiny) == tiny
        assert settings.device == "cpu"
    assert len(seen) == 6


@pytest.mark.parametrize("name", ["benchmarks/gpu.sh", "benchmarks/gpu_kernels.sh", "Makefile"])
def test_what_a_script_names_is_there(name):
    """Folders of tests, files of the package, modules: a script that only a GPU runs goes stale in silence."""
    text = (ROOT / name).read_text()
    paths = re.findall(r"(?:tests|bilevel_fast)/[\w/.]+\w", text)
    modules = re.findall(r"-m ((?:benchmarks|bilevel_fast)\.[\w.]+)", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []
    assert modules


def test_every_op_is_measured_on_a_gpu(capsys):
    exec(re.search(r"for op in \$\(python -c '(.*)'\);", (ROOT / "benchmarks/gpu_kernels.sh").read_text())[1])
    assert capsys.readouterr().out.split() == list(OPS)


def test_nothing_is_begun_that_may_end_too_late(tmp_path):
    done = script(tmp_path, "--device", "cpu", PYTHON="echo", BUDGET="70")
    ended = {line.split()[1].rstrip(":"): line for line in done.stdout.splitlines()}
    assert "not run, it may take 150 s and" in ended["step"]
    assert ended["alignment"].endswith("exit 0")
    assert (tmp_path / "steps.txt").read_text() == done.stdout


def test_a_step_that_fails_takes_nobody_along(tmp_path):
    done = script(tmp_path, "--device", "cpu", PYTHON="false", BUDGET="9999")
    assert done.returncode == 0
    assert all("exit 1" in line for line in done.stdout.splitlines() if "roofline" not in line)
    assert len(done.stdout.splitlines()) == 9


def test_bad_input(tmp_path):
    done = script(tmp_path, "--devise", "cpu")
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        ["error: there is no flag '--devise'; usage: OUT=DIR bash benchmarks/gpu.sh [--device cpu|cuda] [--tiny]"],
    )
    done = script(None)
    assert done.returncode != 0
    assert "set OUT to the folder for the results" in done.stderr
