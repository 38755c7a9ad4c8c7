"""Commands that share no work refuse to be started several times."""

import pytest

from bilevel_fast import attack, erase, export, profile, prune, reproduce
from bilevel_fast.base import alone
from bilevel_fast.base.errors import UserError


@pytest.mark.situation
@pytest.mark.parametrize("module", [attack, erase, export, profile, prune, reproduce])
def test_a_command_that_shares_no_work(command, monkeypatch, module):
    """torchrun starts several processes of a command that works in one: one line says so, nothing is written"""
    arguments = {erase: ["uce"], prune: ["magnitude"]}.get(module, [])
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    code, out, err = command(module.main, *arguments)
    name = module.__name__
    assert (code, out) == (2, "")
    assert err == f"error: 8 processes of {name} were started, wanted 1: they would not share work\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(alone, "_WAIT", 0)
    with pytest.raises(SystemExit, match="2"):
        alone.alone(name)


def test_one_process_of_torchrun_is_alone(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    alone.alone("bilevel_fast.prune")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"2 processes of bilevel_fast\.prune"):
        alone.alone("bilevel_fast.prune")
