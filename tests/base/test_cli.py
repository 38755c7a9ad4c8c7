"""`sample`, `evaluate` and the `bilevel-fast` command, as a user runs them; each command once in a process."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from bilevel_fast.cli import COMMANDS
from bilevel_fast.worlds.mini import TEACHER
from commands import module_command, run_command

FEW = ["--mini.judge-erased", "2", "--mini.judge-kept", "1", "--mini.judge-steps", "3"]


def run(module: str, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    return run_command(import_module(f"bilevel_fast.{module}").main, *flags)


def grid(path: Path) -> torch.Tensor:
    return torch.frombuffer(bytearray(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8)


def test_sample_is_a_function_of_prompt_and_seed(tmp_path):
    prompts = ["--prompts", "a red star", "a blue ring in the style of waves", "--steps", "3"]
    for name, seeds in (("a", ["0", "1"]), ("b", ["0", "1"]), ("c", ["0", "2"])):
        result = run("sample", *prompts, "--seeds", *seeds, "--out", tmp_path / f"{name}.png")
        assert result.returncode == 0, result.stderr
    assert torch.equal(grid(tmp_path / "a.png"), grid(tmp_path / "b.png"))
    assert not torch.equal(grid(tmp_path / "a.png"), grid(tmp_path / "c.png"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "a red sta"], "'sta'"),
        (["--prompts", "a red star", "--model", "nowhere"], "model folder nowhere does not exist"),
        (["--prompts", "a red star", "--steps", "1"], "steps is 1"),
        (["--prompts", "a red star", "--out", str(TEACHER / "model_index.json")], "exists already"),
        (["--prompts"], "--prompts"),
    ],
    ids=["unknown word", "no folder", "too few steps", "existing file", "no prompt"],
)
def test_sample_refusals(flags, message, tmp_path):
    out = [] if "--out" in flags else ["--out", str(tmp_path / "grid.png")]
    result = run("sample", *flags, *out)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "grid.png").exists()


def test_evaluate_prints_json_and_table():
    rows = json.loads(run("evaluate", *FEW, "--json").stdout)
    (row,) = rows.values()
    assert set(row) == {"concept_hit", "content_kept", "other_style_hit", "object", "color", "fid"}
    table = run("evaluate", *FEW).stdout
    assert f"{row['fid']:.3f}" in table


def test_evaluate_refuses_an_unknown_style():
    result = run("evaluate", *FEW, "--erase", "cubism")
    assert result.returncode == 2
    assert result.stderr.startswith("error: style 'cubism' does not exist")


def test_command():
    listed = run("cli", "--help")
    assert listed.returncode == 0
    for name in COMMANDS:
        assert f"  {name} " in listed.stdout
    wrong = run("cli", "trian")
    assert (wrong.returncode, wrong.stderr) == (2, "error: no command 'trian'; did you mean 'train'?\n")
    assert json.loads(run("cli", "train", "--dry-run").stdout)["preset"] == "mini"


@pytest.mark.parametrize("name", ["prune", "erase", "evaluate", "profile"])
def test_a_process_of_its_own(name):
    """As a user starts it: what other tests call in theirs. The other commands have tests that kill them."""
    done = module_command(name, "--nonsense", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_the_package_itself_is_the_command():
    done = subprocess.run([sys.executable, "-m", "bilevel_fast"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run("cli", "--help").stdout
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("  ") for line in lines) == len(COMMANDS)


def test_it_ends_as_the_command_does(tmp_path):
    done = run("cli", "sample", "--prompts", "a red sta", "--out", tmp_path / "grid.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'sta'" in done.stderr


@pytest.mark.situation
def test_a_reader_that_goes_away():
    """`python -m bilevel_fast.train --help | head -1`: one line, and no complaint."""
    code = (
        "import sys; from bilevel_fast.base import errors; from bilevel_fast import {0}\n"
        "sys.argv = ['{0}', '--help']; raise SystemExit(errors.run({0}.main))"
    )
    for name in ("train", "prepare", "cli"):  # more and less than what is buffered
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-c", code.format(name)]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
        os.close(write)
        assert (done.returncode, done.stderr) == (141, ""), name
