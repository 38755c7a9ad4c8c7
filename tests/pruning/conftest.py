"""The command `prune` and a teacher for it."""

from functools import partial

import pytest

from bilevel_fast import prune
from bilevel_fast.pruning import learned, taylor
from mini_folder import make_mini_folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Folder of a small dense model."""
    return make_mini_folder(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture
def few_steps(monkeypatch):
    """For tests that need neither well learned gates nor exact importances."""
    monkeypatch.setattr(learned, "STEPS", 6)
    monkeypatch.setattr(taylor, "LEVELS", 3)


@pytest.fixture
def run(command):
    """Run `python -m bilevel_fast.prune` in this process."""
    return partial(command, prune.main)
