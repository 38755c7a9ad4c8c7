"""Progress bars on a real pseudo-terminal, and that there is none in a pipe or for a rank that is not the first."""

import io
import logging
import os
import re
import sys

import pytest

from bilevel_fast.base.progress import Bar
from bilevel_fast.training.stats import Console
from terminal import COLUMNS, child, drawn, screen, terminal

LOSSES = {"lower/loss": 0.0443219, "upper/loss": 0.31}


def record(step: int) -> dict:
    more = {f"lower/term{n}": 0.5 for n in range(6)} | {"lr": 1e-6}
    head = {"step": step, "images": 16 * step, "seconds": 1.0, "images_per_second": 51.2, "nonfinite": {}}
    return head | {"lower/loss": LOSSES["lower/loss"]} | more | {"upper/loss": LOSSES["upper/loss"]}


@pytest.fixture
def shown(monkeypatch):
    """Draws on a terminal that is this process's standard error; returns its screen."""
    monkeypatch.delenv("RANK", raising=False)

    def show(draw) -> list[str]:
        with terminal() as (user, program), os.fdopen(program, "w") as stream:
            monkeypatch.setattr(sys, "stderr", stream)
            handler = logging.StreamHandler(stream)
            logging.getLogger().addHandler(handler)
            try:
                draw()
                stream.flush()
                text = drawn(user)
            finally:
                logging.getLogger().removeHandler(handler)
        return screen(text)

    return show


def test_a_training_shows_both_losses_the_rate_and_the_time_left(shown):
    def draw():
        console = Console(total=120)
        for step in range(1, 31):
            console.at(step)
            if step % 10 == 0:
                console.write(record(step))
        console.close()

    *lines, last = shown(draw)
    assert last == ""  # the cursor is at the beginning of a line
    (bar,) = lines
    assert len(bar) <= COLUMNS
    assert " 25%|" in bar
    assert "30/120" in bar
    assert "51.2 img/s  lower/loss 0.04432  upper/loss 0.31" in bar
    assert re.search(r"\d\d:\d\d<\d\d:\d\d", bar)


def test_the_bar_moves_between_records(shown):
    def draw():
        console = Console(total=4)
        console.write(record(1))
        console.at(3)
        console.close()

    assert "3/4" in shown(draw)[0]


def test_log_lines_stand_above_the_bar_whole(shown):
    def draw():
        with Bar("img") as bar:
            bar(1, 4)
            logging.getLogger("bilevel_fast.x").warning("a line of its own")
            bar(2, 4, "1 dropped")
            logging.getLogger("bilevel_fast.x").warning("and another one")
        logging.getLogger("bilevel_fast.x").warning("after it")

    first, second, bar, after, last = shown(draw)
    assert (first.rstrip(), second.rstrip(), after, last) == ("a line of its own", "and another one", "after it", "")
    assert "2/4" in bar
    assert "img/s" in bar
    assert "1 dropped" in bar


def test_only_the_first_rank_draws(shown, monkeypatch):
    def draw():
        monkeypatch.setenv("RANK", "1")
        with Bar("img") as bar:
            bar(1, 4)
        Console(total=4).close()

    assert shown(draw) == [""]


def test_there_is_no_bar_in_a_pipe(capsys):
    with Bar("img") as bar:
        bar(1, 4)
        bar(4, 4, "1 dropped")
    console = Console(total=120)
    console.at(3)
    console.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.situation
def test_control_c_while_the_bar_is_made(shown):
    """Ctrl-C in the moment in which a bar first appears: what is said next stands below the bar, not in its line."""

    class Interrupted(io.StringIO):
        def __init__(self, stream):
            super().__init__()
            self.stream, self.typed = stream, False

        def isatty(self):
            return True

        def fileno(self):
            return self.stream.fileno()

        def write(self, text):
            self.stream.write(text)
            self.stream.flush()
            if "/4 [" in text and not self.typed:
                self.typed = True
                raise KeyboardInterrupt
            return len(text)

    def draw():
        stream = Interrupted(sys.stderr)
        try:
            with Bar("img", stream) as bar:
                bar(1, 4)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)

    bar, said, last = shown(draw)
    assert "1/4 [" in bar
    assert (said, last) == ("interrupted", "")


LOOP = """
import time
from bilevel_fast.base import errors
from bilevel_fast.base.progress import Bar
def main():
    with Bar("img") as bar:
        for done in range(4000):
            bar(done, 4000)
            time.sleep(0.05)
raise SystemExit(errors.run(main))
"""


@pytest.mark.situation
def test_control_c_on_a_terminal():
    """Ctrl-C while a bar is drawn: one line says so, the bar stays whole above it, the exit code is 130."""
    code, text = child([sys.executable, "-c", LOOP], "\x03", when=lambda text: "/4000 [" in text)
    assert code == 130, text
    bar, said, last = screen(text)
    assert re.search(r"\d+/4000 \[", bar), text
    assert len(bar.removesuffix("^C")) <= COLUMNS
    assert (said, last) == ("interrupted", "")
