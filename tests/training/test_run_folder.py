"""The run folder: one run, one process, one configuration, and no file that is half written."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bilevel_fast.base.errors import UserError
from bilevel_fast.training.run_folder import RunFolder, flatten

CONFIG: dict[str, Any] = {
    "preset": "mini",
    "steps": 100,
    "lower": {"lr": 1e-6, "betas": (0.9, 0.999)},
    "output": {"every": 10, "events": True},
    "empty": {},
}

HOLDER = """
import sys
from pathlib import Path
from bilevel_fast.training.run_folder import RunFolder
with RunFolder.open(Path(sys.argv[1]), {"steps": 1}, resume=False):
    print("holding", flush=True)
    sys.stdin.read()
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(path: Path, config: dict[str, Any] = CONFIG, *, resume: bool, volatile: tuple[str, ...] = ()) -> str:
    """The line of the refusal, after making sure that it is one."""
    with pytest.raises(UserError) as caught, RunFolder.open(path, config, resume=resume, volatile=volatile):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_run_and_its_files(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "runs" / "a", CONFIG, resume=False) as run:
        assert run.path == tmp_path / "runs" / "a"
        assert json.loads(run.config.read_text()) == json.loads(json.dumps(CONFIG))
        assert run.write_json("summary.json", {"macs": [1, 2]}) == run.summary
        run.write_text("report.html", "é")
        run.write_bytes("samples/0.png", b"\x89PNG")
    assert sorted(contents(run.path)) == [
        ".lock",
        "config.json",
        "report.html",
        "samples/0.png",
        "summary.json",
    ]
    assert json.loads(run.summary.read_text()) == {"macs": [1, 2]}
    assert run.report.read_bytes() == b"\xc3\xa9"
    assert (run.samples / "0.png").read_bytes() == b"\x89PNG"
    assert [path.name for path in (run.stats, run.checkpoints, run.student, run.events)] == [
        "stats.jsonl", "checkpoints", "student", "events"
    ]  # fmt: skip


def test_json_is_strict(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIG, resume=False) as run, pytest.raises(ValueError, match="JSON"):
        run.write_json("summary.json", {"fid": float("nan")})
    assert not run.summary.exists()


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIG, resume=False):
        pass
    before = contents(tmp_path)
    assert refused(tmp_path, CONFIG | {"steps": 7}, resume=False) == (
        f"run folder {tmp_path} already holds a run; pass --resume to continue it or choose another --out"
    )
    assert contents(tmp_path).items() >= {k: v for k, v in before.items() if k != ".lock"}.items()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    refused(tmp_path, resume=False)
    assert contents(tmp_path) == {"thesis.tex": b"x"}
    for path in (tmp_path / "thesis.tex", tmp_path / "thesis.tex" / "run"):
        assert refused(path, resume=False).startswith(f"{path} cannot be a run folder")


def test_a_killed_start_does_not_block_the_next(tmp_path: Path) -> None:
    """Killed between the lock and config.json: nothing but dot files is there."""
    (tmp_path / ".lock").write_text("1 on nowhere")
    (tmp_path / ".config.json.tmp").write_text("{")
    with RunFolder.open(tmp_path, CONFIG, resume=False) as run:
        assert run.config.exists()


@pytest.mark.situation
def test_a_planted_lock_is_not_followed(tmp_path: Path) -> None:
    """Somebody has planted a link where a run keeps its lock: refused, and what it leads to stays as it was."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "mine")
    assert refused(tmp_path / "run", resume=False).endswith(".lock is a link, and would be written through; delete it")
    assert (tmp_path / "mine").read_text() == "mine"


def test_resume_goes_on_with_the_same_settings(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIG, resume=False) as run:
        run.write_text("stats.jsonl", "kept")
    changed = CONFIG | {"output": {"every": 20}, "steps": 200}
    with RunFolder.open(tmp_path, changed, resume=True, volatile=("output", "steps")) as run:
        assert run.stats.read_text() == "kept"
        assert json.loads(run.config.read_text())["steps"] == 200, "the record is of the run as it goes on"


def test_a_folder_is_looked_at_without_a_trace(tmp_path: Path) -> None:
    RunFolder(tmp_path / "new").check(resume=False)
    assert not (tmp_path / "new").exists()
    with RunFolder.open(tmp_path / "a", CONFIG, resume=False) as run:
        run.check(resume=False)  # whoever holds it is named by `open`, which knows
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder(tmp_path / "a").check(resume=False)
    RunFolder(tmp_path / "a").check(resume=True)


def test_a_setting_that_is_newer_than_the_run_was_as_it_is_where_nobody_sets_it(tmp_path: Path) -> None:
    """A run of an earlier release is gone on with after an upgrade that brought a setting, unless that is set."""
    with RunFolder.open(tmp_path, CONFIG, resume=False):
        pass
    unset = CONFIG | {"solver": "constant", "lower": {**CONFIG["lower"], "gamma": None, "lr": 9.0}}
    newer = CONFIG | {"solver": "constant", "lower": {**CONFIG["lower"], "gamma": None}}
    with RunFolder.open(tmp_path, newer, resume=True, unset=unset):
        pass
    with RunFolder.open(tmp_path / "b", CONFIG, resume=False):
        pass
    for other in (newer | {"solver": "bome"}, newer | {"lower": CONFIG["lower"] | {"gamma": 5.0}}):
        opening = RunFolder.open(tmp_path / "b", other, resume=True, unset=unset)
        with pytest.raises(UserError, match=r"with other settings: \S+ was absent, is "), opening:
            pass
    line = refused(tmp_path / "b", newer, resume=True)
    assert line.endswith('gamma was absent, is null; solver was absent, is "constant"')


def test_resume_names_the_settings_that_differ(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIG, resume=False):
        pass
    other = CONFIG | {
        "lower": {"lr": 2e-6, "betas": [0.9, 0.999], "eps": 1e-8},
        "steps": 200,
        "empty": {"x": None},
    }
    del other["preset"]
    before = contents(tmp_path)
    # In the order of the keys; `low` is no section, and does not make `lower.lr` volatile.
    line = refused(tmp_path, other, resume=True, volatile=("preset", "output.every", "low"))
    assert line == (
        f"run folder {tmp_path} holds a run with other settings: empty was {{}}, is absent; "
        "empty.x was absent, is null; lower.eps was absent, is 1e-08; and 2 more"
    )
    line = refused(tmp_path, other, resume=True, volatile=("empty", "lower.eps"))
    assert line.endswith('lower.lr was 1e-06, is 2e-06; preset was "mini", is absent; steps was 100, is 200')
    assert contents(tmp_path)["config.json"] == before["config.json"]


def test_resume_without_a_run(tmp_path: Path) -> None:
    path = tmp_path / "missing"
    assert refused(path, resume=True) == (f"there is no run to resume in {path}: {path / 'config.json'} does not exist")
    assert not path.exists()


def test_resume_with_a_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"steps": ')
    assert f"{tmp_path / 'config.json'} is not JSON" in refused(tmp_path, resume=True)
    (tmp_path / "config.json").write_text("[]")
    assert "wanted a JSON object" in refused(tmp_path, resume=True)


def test_the_lock_of_a_live_process_and_its_end_with_kill_9(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"holding\n"
        for resume in (False, True):
            line = refused(tmp_path, {"steps": 1}, resume=resume)
            assert re.fullmatch(rf"run folder .* is in use by process {holder.pid} on .*", line), line
        holder.send_signal(signal.SIGKILL)
    with RunFolder.open(tmp_path, {"steps": 1}, resume=True) as run:
        assert (run.path / ".lock").read_text().split()[0] == str(os.getpid())


def test_the_lock_goes_with_the_block(tmp_path: Path) -> None:
    def fail() -> None:
        with RunFolder.open(tmp_path, CONFIG, resume=False):
            assert "in use by process" in refused(tmp_path, resume=True)
            raise RuntimeError("training failed")

    with pytest.raises(RuntimeError, match="training failed"):
        fail()
    with RunFolder.open(tmp_path, CONFIG, resume=True):
        pass


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [{"e": 2}]}, "f": {}, "g": None}) == {
        "a.b.c": 1, "a.d": [{"e": 2}], "f": {}, "g": None
    }  # fmt: skip
