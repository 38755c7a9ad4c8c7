"""Completion in a real bash; the scripts for zsh and fish hold the same words."""

import shutil
import subprocess

import pytest

from bilevel_fast import completion
from bilevel_fast.cli import COMMANDS
from commands import run_command

BASH = shutil.which("bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    done = run_command(completion.main, "bash")
    assert (done.returncode, done.stderr) == (0, "")
    path = tmp_path_factory.mktemp("completion") / "bilevel-fast"
    path.write_text(done.stdout)
    (path.parent / "sd21").mkdir()
    return path


def complete(script, *words: str) -> set[str]:
    """What TAB offers behind these words, the last of which is being typed."""
    code = """
    source "$1"; shift
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
    call=$(complete -p bilevel-fast); call=${call##*-F }; ${call%% *} bilevel-fast "${COMP_WORDS[COMP_CWORD]}"
    printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        [BASH or "bash", "--norc", "-c", code, "bash", str(script), "bilevel-fast", *words],
        capture_output=True, text=True, check=False, cwd=script.parent,
    )  # fmt: skip
    assert "error" not in done.stderr.lower(), done.stderr
    return {line.strip() for line in done.stdout.splitlines() if line.strip()}


def test_commands_and_what_follows_them(script):
    assert complete(script, "") >= set(COMMANDS)
    assert complete(script, "tr") == {"train"}
    assert complete(script, "prepare", "") >= {"coco", "folder", "webdataset", "check", "concepts"}
    assert complete(script, "prune", "") >= {"magnitude", "bk-sdm-base", "aptp", "import-aptp"}
    assert complete(script, "erase", "") >= {"uce", "concept-prune"}
    assert complete(script, "completion", "") >= {"bash", "zsh", "fish"}


def test_flags_values_and_paths(script):
    assert complete(script, "train", "--upper.es") == {
        "--upper.esd.guidance",
        "--upper.esd.steps",
        "--upper.esd.compat",
    }
    assert complete(script, "train", "--upper.anchor", "") == {"phrase", "null"}
    assert complete(script, "sample", "--method", "p") == {"pndm"}
    assert complete(script, "prepare", "coco", "--resol") == {"--resolution"}
    assert complete(script, "prune", "magnitude", "--bud") == {"--budget"}
    assert {found.rstrip("/") for found in complete(script, "sample", "--model", "sd")} == {"sd21"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(shell):
    text = run_command(completion.main, shell).stdout
    assert "bilevel-fast" in text
    for word in (*COMMANDS, "webdataset", "magnitude", "upper.esd.steps"):
        assert word in text, word


def test_another_shell_is_refused():
    done = run_command(completion.main, "ksh")
    assert done.returncode == 2
    assert "bash" in done.stderr
