"""Every command that writes, and what happens to it meanwhile: killed, no room, no right to write, a second process."""

import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from every_command import COMMANDS, SLOW, Command, filled, leftovers, make_world, outcome
from forked import Started
from mishap import Fault

SOAK = "SOAK" in os.environ
CHAINS = int(os.environ.get("SOAK") or 20) if SOAK else 1
"""Folders that something happens to again and again, for each command; `make soak` sets how many."""
DONE = ("exists already", "already holds")
NAMES = [*COMMANDS, *(SLOW if SOAK else ())]


@dataclass
class Place:
    """A command, what it reads, and what it makes when nothing happens."""

    command: Command
    world: Path
    path: Path
    number: int = 0

    def fresh(self) -> Path:
        """A folder as it is before the call."""
        self.number += 1
        out = self.path / f"out-{self.number}"
        shutil.copytree(self.path / "before", out)
        return out

    def start(self, out: Path, kind: Any = "none", at: int = 0) -> tuple[Started, Fault]:
        self.number += 1
        log, fault = self.path / f"log-{self.number}", Fault(out, self.path / f"events-{self.number}", kind, at)
        return Started(*self.command.arguments(self.world, out), log=log, fault=fault), fault

    def call(self, out: Path, kind: Any = "none", at: int = 0) -> tuple[int, str, list[str]]:
        """Exit status, what was said, events."""
        process, fault = self.start(out, kind, at)
        return process.wait(), process.said(), fault.seen()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(params=NAMES, scope="module")
def place(request, world, tmp_path_factory) -> Place:
    command = (COMMANDS | SLOW)[request.param]
    path = tmp_path_factory.mktemp("place")
    (path / "before").mkdir()
    if command.first:
        words = filled(command.first, world, path / "before")
        assert Started(*words, log=path / "first.log").wait() == 0, (path / "first.log").read_text()
    return Place(command, world, path)


@pytest.fixture(scope="module")
def whole(place) -> tuple[dict[str, Any], list[str], int]:
    """What it makes, the events on the way, and the size of the largest file."""
    out = place.fresh()
    status, said, events = place.call(out)
    assert status == 0, said
    made = outcome(out)
    assert made.keys() > outcome(place.path / "before").keys()
    assert leftovers(out) == []
    return made, events, max(path.stat().st_size for path in out.rglob("*") if path.is_file())


def mishaps(events: list[str], largest: int, dice: random.Random) -> Iterator[tuple[str, int]]:
    """A few, at the moments that matter: a file is whole and not yet in its place, or what was replaced goes."""
    moves = [n for n, event in enumerate(events, 1) if event.startswith(("os.rename", "os.remove"))]
    syncs = [n for n, event in enumerate(events, 1) if event.startswith("fsync")]
    yield "kill", dice.choice(moves)
    yield "full", dice.choice(syncs)
    yield "tear", dice.randint(1, largest)
    if SOAK:
        yield "kill", dice.randint(1, len(events))
        yield "full", dice.randint(1, len(events))
        yield "kill", dice.randint(1, len(events))


def is_refusal(said: str, out: Path) -> bool:
    """Whether it ends in one line that names a place in the folder."""
    line = said.splitlines()[-1] if said else ""
    return line.startswith("error: ") and str(out) in line and "Traceback" not in said


@pytest.mark.situation
@pytest.mark.parametrize("chain", range(CHAINS))
def test_the_next_call_goes_on(place, whole, chain):
    """A command is killed again and again, or has no room: the next call makes the same files, and no others."""
    made, events, largest = whole
    out, dice, happened = place.fresh(), random.Random(f"{place.command.words} {chain}"), list[str]()
    for kind, at in mishaps(events, largest, dice):
        status, said, seen = place.call(out, kind, at)
        happened.append(f"{kind} {at}: {status}, before {seen[at - 1 : at] if kind != 'tear' else seen[-1:]}")
        if kind == "full" and status != 0:
            assert status in (1, 2), (happened, said)
            assert is_refusal(said, out), (happened, said)
            assert leftovers(out) == [], happened
        else:
            assert status in (0, 2, -signal.SIGKILL, -signal.SIGXFSZ), (happened, said)
        if status in (0, 2):  # it was done before
            break
    status, said, _ = place.call(out)
    if status != 0:
        assert status == 2, (happened, said)
        assert is_refusal(said, out), (happened, said)
        assert any(text in said for text in DONE), (happened, said)
    found = outcome(out)
    assert found.keys() == made.keys(), happened
    assert [name for name in made if found[name] != made[name]] == [], happened
    assert leftovers(out) == [], happened
    shutil.rmtree(out)


@pytest.mark.situation
def test_a_folder_that_cannot_be_written_to(place):
    """The output lies on a disk that is mounted read-only: one line names it, and nothing is written anywhere."""
    out = place.fresh()
    before = outcome(out)
    status, said, _ = place.call(out, "forbidden")
    assert status in (1, 2), said
    assert is_refusal(said, out), said
    assert outcome(out) == before
    assert leftovers(out) == []


@pytest.mark.situation
def test_two_processes_for_one_output(place, whole):
    """The same command is called twice at a time: one makes it, and the other is refused or takes part."""
    out = place.fresh()
    processes = [place.start(out)[0] for _ in range(2)]
    ends = [(process.wait(), process.said()) for process in processes]
    assert sorted(status for status, _ in ends) in ([0, 0], [0, 2]), ends
    for status, said in ends:
        assert status == 0 or is_refusal(said, out), said
    assert outcome(out) == whole[0]
    assert leftovers(out) == []
