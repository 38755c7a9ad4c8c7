"""`doctor`: its report of this machine, and of one where something is broken."""

import sys
from pathlib import Path

import pytest

from bilevel_fast import doctor
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.structure import Structure
from bilevel_fast.ops.reasons import IMPLEMENTED
from bilevel_fast.profiling.memory import estimate
from bilevel_fast.runs import doctor as report_of
from bilevel_fast.runs.config import PRESETS
from bilevel_fast.worlds.mini import TEACHER
from commands import run_command


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return report_of.examine(tmp_path_factory.mktemp("here") / "runs")


def cells(report, section: str) -> dict[str, tuple[str, ...]]:
    return {line[0]: line[1:] for line in report.sections[section]}


def test_it_says_everything_in_80_columns(report):
    assert max(map(len, report.text.splitlines())) <= 80
    assert report.text.endswith("the mini preset can run:  python -m bilevel_fast.train")
    assert set(cells(report, "who runs an op")) == {"op", *IMPLEMENTED}
    assert {"bilevel-fast", "python", "torch", "triton", "cuda"} <= set(cells(report, "installed"))
    assert cells(report, "native modules")["_C"][0] == "built"
    assert {"CPU", "memory", "disk"} <= set(cells(report, "machine"))
    assert "cannot be said" not in report.text


def test_memory_is_the_memory_model_s(report, device):
    found = cells(report, "memory of a preset")
    assert set(found) == {"preset", *PRESETS}
    folder = load_folder(TEACHER)
    sizes = Structure.dense(folder.config), folder.config.sample_size, folder.text_encoder.length
    wanted = estimate(*sizes, batch=16, precision="fp32" if device == "cpu" else "bf16").total
    assert found["mini"] == ("16", f"{wanted / 2**30:.1f} GiB", "fits")
    assert found["paper"][2].startswith("SD 2.1: ")


def test_weights_alone_are_less_than_all(report):
    from bilevel_fast.profiling.memory import standing

    folder = load_folder(TEACHER)
    sizes = Structure.dense(folder.config), folder.config.sample_size, folder.text_encoder.length
    memory = estimate(*sizes, batch=4, precision="fp32", second=False)
    held = memory.weights + memory.gradients + memory.moments + memory.teacher_weights
    assert standing(*sizes, precision="fp32", second=False) == held < memory.total


@pytest.mark.situation
def test_a_native_module_that_does_not_load(tmp_path, monkeypatch):
    """A native module that is cut short: `doctor` says so in one line, with the command that builds it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "zz_cut.abi3.so").write_bytes(b"\x7fELF, and no more")
    assert "zz_cut.abi3.so" in (report_of.built("zz_cut") or "")
    assert report_of.built("zz_none") == "not built"
    monkeypatch.setattr(report_of, "NATIVE", ("zz_cut", "zz_none"))
    report = report_of.examine(tmp_path)
    assert "the mini preset cannot run:" in report.text
    assert len(report.refused) == 1
    assert ("_C", "pip install -e .") in report.missing
    assert max(map(len, report.text.splitlines())) <= 80


@pytest.mark.situation
def test_a_provider_that_there_is_not(monkeypatch):
    """`BILEVEL_FAST_OPS=tritn`: `doctor` says that no run would start, and ends with 1."""
    monkeypatch.setenv("BILEVEL_FAST_OPS", "tritn")
    done = run_command(doctor.main)
    assert (done.returncode, done.stderr) == (1, "")
    out = done.stdout
    assert "the mini preset cannot run:" in out
    assert "did you mean 'triton'?" in " ".join(out.split())


def test_a_part_that_raises_is_a_line(tmp_path, monkeypatch):
    def broken(name):
        raise OSError("cannot map libtorch.so\nand more")

    monkeypatch.setattr(report_of, "_machine", lambda report, runs: broken("x"))
    report = report_of.examine(tmp_path)
    assert report.sections["machine"] == [("cannot be said: cannot map libtorch.so",)]
    assert report.sections["who runs an op"]


def test_variables_and_extras(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")
    monkeypatch.setenv("BILEVEL_FAST_OPT", "1")
    monkeypatch.setattr(report_of, "requirements", lambda: ["torch>=99", 'zz-none>=1; extra == "zz"'])
    report = report_of.examine(tmp_path)
    environment = cells(report, "environment")
    assert environment["BILEVEL_FAST_OPS"] == ("'torch': the provider that runs all ops that it can",)
    assert "did you mean 'BILEVEL_FAST_OPS'?" in environment["BILEVEL_FAST_OPT"][0]
    assert ("extra zz", "pip install 'bilevel-fast[zz]'") in report.missing
    assert report.refused == ["torch is too old, wanted 99 or newer"]


def test_runs_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(report_of.os, "access", lambda path, mode: False)
    report = report_of.examine(Path("/proc/runs"))
    assert any("cannot be written to" in why for why in report.refused)


def test_the_exit_code():
    done = run_command(doctor.main)
    assert (done.returncode, done.stderr) == (0, "")
    assert str(Path(sys.executable)) in "".join(done.stdout.split())
