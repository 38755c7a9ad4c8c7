"""`--help` and `--help-all` of every command: fits the terminal, groups, each default once, every flag."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from bilevel_fast.base import flags
from bilevel_fast.base.flag_list import flags_of
from bilevel_fast.base.help import laid_out, page
from bilevel_fast.cli import COMMANDS
from commands import run_command

ROOT = Path(__file__).parents[2]


def kinds() -> dict[str, type]:
    """What every command reads its flags into, by its words."""
    found = {}
    for command in COMMANDS:
        module = importlib.import_module(f"bilevel_fast.{command}")
        found |= {f"{command} {name}".strip(): kind for name, kind in module.settings().items()}
    return found


KINDS = kinds()


def width(monkeypatch, columns: int) -> int:
    monkeypatch.setenv("COLUMNS", str(columns))
    return columns


@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_wider_than_the_terminal(columns, monkeypatch):
    width(monkeypatch, columns)
    for words, kind in KINDS.items():
        for everything in (False, True):
            module = importlib.import_module(f"bilevel_fast.{words.split()[0]}")
            text = page(kind, f"bilevel_fast.{words}", module.__doc__, everything=everything)
            wide = [line for line in text.splitlines() if len(line) > columns]
            assert not wide, (words, wide)
            assert str(ROOT) not in text, words


def test_every_flag_is_on_the_long_page_and_each_default_once():
    for words, kind in KINDS.items():
        text = page(kind, words, None, everything=True)
        words_alone = {f"--{flag.names[0].replace('_', '-')}" for flag in flags_of(kind) if flag.word}
        shown = set(re.findall(r"(?:^  |, )(--[\w.-]+)", text, flags=re.MULTILINE))
        assert set(flags._flags(kind)) - words_alone <= shown, words
        for flag in flags_of(kind):
            assert len(re.findall("[Dd]efault:|by default", flag.text)) <= 1, (words, flag.names, flag.text)
            assert flag.text, (words, flag.names)


def test_what_a_page_names_is_a_flag():
    """A mistyped name in MAIN or GROUPS would take a flag off the page without a word."""
    for words, kind in KINDS.items():
        known = {flag.removeprefix("--").replace("-", "_") for flag in flags._flags(kind)}
        for owner in kind.__mro__:
            named = set(vars(owner).get("MAIN", ()))
            named |= {name for names in vars(owner).get("GROUPS", {}).values() for name in names}
            inherits = {"root", "split", "tars", "caption_field"}  # of those who inherit `Making`
            assert named - inherits <= known, (words, named - known)


def test_short_pages_are_short():
    for words, kind in KINDS.items():
        shown = [flag for flag in flags_of(kind) if flag.main]
        assert 0 < len(shown) <= 27 or words in ("doctor", "completion"), (words, len(shown))


def texts(words: str) -> dict[str, str]:
    return {flag.names[0]: flag.text for flag in flags_of(KINDS[words])}


def test_defaults_and_ranges():
    train = texts("train")
    assert train["--lower.steps"].endswith("(default: 20000; >= 1)")
    assert train["--seed"].endswith("(default: 0; >= 0 and < 2**64)")
    assert train["--scale.leaves"].endswith("(default: 1; >= 1)")  # 1 is True, and is shown all the same
    assert train["--upper.esd.guidance"].endswith("(default: 3)")
    assert train["--upper.concept-prune.every"].endswith("(default: 0; >= 0)")
    assert train["--prune.budget"].endswith("(default: 0.8; > 0 and <= 1)")  # said by the class around it
    assert train["--twin"].endswith("(default: on)")
    assert train["--teacher"].endswith("Default: the built-in teacher of --world.")
    assert texts("reproduce")["--run.prune.budget"].endswith("> 0 and <= 1)")
    assert texts("convert")["--file"].endswith("(required)")


def test_words_choices_and_what_is_there_several_times():
    sample = {flag.names[0]: flag for flag in flags_of(KINDS["sample"])}
    assert (sample["--method"].metavar, sample["--seeds"].metavar) == ("pndm|ddim", "INT ...")
    assert sample["--model"].path
    assert sample["--model"].metavar == "PATH"
    (experiment,) = [flag for flag in flags_of(KINDS["reproduce"]) if flag.word]
    assert experiment.choices[0] == "table1"
    assert (experiment.metavar, experiment.text) == (
        "EXPERIMENT",
        "Which table or figure. One of table1, table2, table3, fig4, fig5, fig6, fig7.",
    )


@pytest.mark.parametrize("words", ["train", "sample", "erase", "erase uce", "prune route", "prepare", "doctor"])
def test_a_command_shows_its_page(words, monkeypatch):
    width(monkeypatch, 80)
    command, *more = words.split()
    done = run_command(importlib.import_module(f"bilevel_fast.{command}").main, *more, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_short_page_says_how_many_more_there_are(monkeypatch):
    width(monkeypatch, 80)
    text = run_command(importlib.import_module("bilevel_fast.train").main, "--help").stdout
    every = run_command(importlib.import_module("bilevel_fast.train").main, "--help-all").stdout
    (more,) = re.findall(r"--help-all +(\d+) further flags", text)
    assert len(re.findall("^  --", every, re.MULTILINE)) == len(re.findall("^  --", text, re.MULTILINE)) - 1 + int(more)
    assert "--upper.esd.steps" in every
    assert "--upper.esd.steps" not in text
    assert text.index("run:") < text.index("--lower.*:") < text.index("--upper.*:")
    assert "(default: 120; >= 1)" in text  # of the preset, not of the class


def test_a_command_over_two_lines_of_a_docstring_is_one():
    text = laid_out("python -m a --one 1\n    --two 2\n\npython -m b", 80)
    assert text == "python -m a --one 1 --two 2\n\npython -m b"


def test_a_docstring_for_a_narrow_terminal():
    command = (
        """python -m bilevel_fast.sample --prompts "a red star" "in the style of waves" --seeds 0 1 --out grid.png"""
    )
    text = laid_out(f"A line that is\nfilled up.\n\n{command}\n\nuce     the keys and values of a text\n", 40)
    lines = text.splitlines()
    assert lines[0] == "A line that is filled up."
    assert shlex.split(text[text.index("python") : text.index("uce")].replace("\\\n", "")) == shlex.split(command)
    assert "" in lines[1:-1]
    assert lines[-1].startswith(" " * 8) or lines[-1] == "uce     the keys and values of a text"
    assert max(map(len, lines)) <= 40
