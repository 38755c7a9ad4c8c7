"""The script for one GPU: its commands are ones that exist, nothing is begun too late, bad input is one line."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from benchmarks import ROOT
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


PHASES = (
    *("kernels", "tune", "step", "tests", "unet", "roofline", "profile", "step_055", "step_batch_2", "alignment"),
    *("mixture", "kernels_batch_2", "tune_batch_2"),
)


def ended(done):
    """phase -> how it ended, of what the script printed before the page."""
    lines = [line.split(" ", 1)[1] for line in done.stdout.splitlines() if re.match(r"\d\d:\d\d:\d\d ", line)]
    return dict(line.split(": ", 1) for line in lines)


@pytest.mark.parametrize("rehearse", [True, False])
def test_every_command_can_be_parsed(tmp_path, rehearse):
    """The script runs with `echo` for Python; what it would have called is read as the called would read it."""
    done = script(tmp_path, *["--rehearse"] * rehearse, PYTHON="echo", BUDGET="9999")
    assert done.returncode == 0, done.stderr
    found = ended(done)
    names = [name for name in found if name not in ("wheels", "memcheck", "racecheck")]
    assert tuple(names[: len(PHASES)]) == PHASES, "the table of providers, the step, that it is right, the rest"
    assert bool(names[len(PHASES) :]) != rehearse
    seen = set()
    for name in names:
        assert found[name].startswith("done"), found[name]
        _, module, *rest = shlex.split((tmp_path / f"{name}.txt").read_text())
        seen.add(module)
        if module == "bilevel_fast.profile":
            profile.parse(rest)
        elif module != "pytest":
            settings = flags.parse(importlib.import_module(module).Settings, module, None, args=rest)
            assert getattr(settings, "tiny", rehearse) == rehearse
            assert settings.device == ("cpu" if rehearse or getattr(settings, "tune", False) else "cuda")
    assert len(seen) == 8


@pytest.mark.slow
def test_the_first_phases_run_on_a_cpu(tmp_path):
    """Those that need the script to work together, for real; the others are commands that have tests of their own."""
    (tmp_path / "done").mkdir()
    for name in PHASES[4:]:
        (tmp_path / "done" / name).touch()
    (tmp_path / "done" / "step").touch()
    table = (ROOT / "bilevel_fast/ops/providers.json").read_text()
    done = script(tmp_path, "--rehearse", PYTHON=sys.executable, BUDGET="9999", OMP_NUM_THREADS="1")
    found = ended(done)
    assert all(found[name].startswith("done, ") for name in ("kernels", "tune", "tests")), done.stdout
    assert {found[name] for name in PHASES[4:]} == {"done before"}
    ranked = json.loads((tmp_path / "providers.json").read_text())["cpu"]
    rankings = [ranking for sizes in ranked.values() for ranking in sizes.values() if isinstance(ranking, list)]
    assert rankings
    assert {ranking[-1] for ranking in rankings} == {"torch"}, "measured just now"
    assert (ROOT / "bilevel_fast/ops/providers.json").read_text() == table, "a rehearsal leaves the tree alone"
    verdict = (tmp_path / "verdict.md").read_text()
    assert verdict in done.stdout
    assert verdict.startswith("# Verdict")
    assert "tune: done, " in verdict


@pytest.mark.parametrize("name", ["benchmarks/gpu.sh", "Makefile"])
def test_what_a_script_names_is_there(name):
    """Folders of tests, files of the package, modules: a script that only a GPU runs goes stale in silence."""
    text = (ROOT / name).read_text()
    paths = re.findall(r"(?:tests|bilevel_fast)/[\w/.]+\w", text)
    modules = re.findall(r"-m ((?:benchmarks|bilevel_fast)\.[\w.]+)", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []
    assert modules


def test_nothing_is_begun_that_may_end_too_late(tmp_path):
    done = script(tmp_path, "--rehearse", PYTHON="echo", BUDGET="65")
    found = ended(done)
    assert found["kernels"] == "skipped, it may take 170 s and 50 s are left"
    assert found["tune"].startswith("done")
    assert found["unet"].startswith("done"), "in less time than it may take, but more than half of it"
    phases = (tmp_path / "phases.txt").read_text()
    assert done.stdout.startswith(phases)


def test_a_phase_that_fails_takes_nobody_along(tmp_path):
    done = script(tmp_path, "--rehearse", PYTHON="false", BUDGET="9999")
    assert done.returncode == 0, done.stderr
    found = ended(done)
    assert set(found) == {*PHASES, "kernels_again"}
    assert all(how.startswith("failed with 1") for how in found.values())


def test_a_second_start_goes_on_where_the_first_stopped(tmp_path):
    script(tmp_path, "--rehearse", PYTHON="false", BUDGET="9999")
    (tmp_path / "done" / "step").touch()
    found = ended(script(tmp_path, "--rehearse", PYTHON="echo", BUDGET="9999"))
    assert found["step"] == "done before"
    assert found["kernels"].startswith("done, ")
    again = ended(script(tmp_path, "--rehearse", PYTHON="echo", BUDGET="9999"))
    assert set(again.values()) == {"done before"}


def test_bad_input(tmp_path):
    done = script(tmp_path, "--devise", "cpu")
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        ["error: there is no flag '--devise'; usage: OUT=DIR bash benchmarks/gpu.sh [--rehearse]"],
    )
    done = script(None)
    assert done.returncode != 0
    assert "set OUT to the folder for the results" in done.stderr
