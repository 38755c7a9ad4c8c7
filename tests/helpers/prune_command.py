"""Fixtures of the tests of `python -m bilevel_fast.prune`; a file that means another teacher or command has its own."""

import pytest

from bilevel_fast import prune
from bilevel_fast.base import errors
from mini_folder import make_mini_folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Folder of a small dense model."""
    return make_mini_folder(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command; return its exit code and what it wrote to stdout and stderr."""

    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["prune", *map(str, arguments)])
        return errors.run(prune.main), *capsys.readouterr()

    return command
