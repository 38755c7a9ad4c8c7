"""Two elastic agents of torchrun, as on two machines: one is killed with all it has started, comes back, and the run
ends with the bits of one that nobody touched. In network namespaces of their own where that is allowed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import ranked
from bilevel_fast.runs import sessions
from bilevel_fast.train import main
from commands import run_command
from short_runs import FLAGS, assert_same, records, until

STEPS = 8
NETWORK = "10.213.7"
PATIENCE = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
"""Seconds that an agent waits for others, and until it takes silence for an end."""


@dataclass
class Machine:
    """Where an agent and its ranks run.

    Attributes:
        prefix: What a command is started by there.
        address: How the others reach it.
        log: What its agents have said.
    """

    prefix: list[str]
    address: str
    log: Path
    agents: list[subprocess.Popen] = field(default_factory=list)

    def start(self, first: "Machine", *command: str) -> None:
        agent = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=9"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={first.address}:29471", "--rdzv-id=two-machines"),
            f"--rdzv-conf=is_host={int(first is self)},{PATIENCE}",
            f"--local-addr={self.address}",
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        words = [*self.prefix, *agent, "-m", "bilevel_fast.train", *command]
        with self.log.open("ab") as log:
            self.agents.append(subprocess.Popen(words, stdout=log, stderr=log, env=env, start_new_session=True))

    def runs(self) -> bool:
        return bool(self.agents) and self.agents[-1].poll() is None

    def ranks(self) -> list[int]:
        return list(ranked.ranks_of(self.agents[-1]).values())

    def lose(self) -> None:
        """The machine is gone, with the agent and all it has started."""
        for pid in [self.agents[-1].pid, *self.ranks()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.agents[-1].wait()


def _ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


def _joined(names: list[str], ends: list[str]) -> bool:
    """Whether there now are two network namespaces with a cable between them; it takes root."""
    if not shutil.which("ip") or os.geteuid():
        return False
    done = [_ip("netns", "add", name) for name in names]
    done.append(_ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1]))
    for n, (name, end) in enumerate(zip(names, ends, strict=True), 1):
        done.append(_ip("link", "set", end, "netns", name))
        done.append(_ip("-n", name, "addr", "add", f"{NETWORK}.{n}/24", "dev", end))
        done += [_ip("-n", name, "link", "set", each, "up") for each in (end, "lo")]
    return all(done)


@pytest.fixture
def machines(tmp_path) -> Iterator[list[Machine]]:
    names, ends = [f"bilevel-{os.getpid()}-{n}" for n in (1, 2)], [f"bf{os.getpid() % 10**6}{n}" for n in "ab"]
    apart = _joined(names, ends)
    print("network namespaces" if apart else "one network")
    found = [Machine([], "127.0.0.1", tmp_path / f"{n}.log") for n in (1, 2)]
    if apart:
        for n, (machine, name, end) in enumerate(zip(found, names, ends, strict=True), 1):
            machine.prefix = ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={end}"]
            machine.address = f"{NETWORK}.{n}"
    yield found
    for machine in found:
        if machine.runs():
            machine.lose()
    for name in names:  # and the cable with them
        _ip("netns", "del", name)


def worlds(out: Path) -> list[int]:
    """How many ranks began, each time."""
    return [row["processes"] for row in sessions.read(out) if row["event"] == "begun"]


@pytest.mark.faults
def test_a_machine_is_lost_and_comes_back(machines, tmp_path):
    """The other one goes on alone from the last checkpoint, and with it again, all by the same command."""
    teacher = ranked.teacher(tmp_path)
    flags = [*FLAGS, "--teacher", str(teacher), "--lower.steps", str(STEPS), "--checkpoint-every", "1"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run_command(main, *flags, "--out", whole).returncode == 0
    first, second = machines

    def said() -> str:
        return "".join(f"--- {m.log.name}\n{m.log.read_text()[-6000:]}\n" for m in machines if m.log.exists())

    command = [*flags, "--out", str(out)]
    first.start(first, *command)
    second.start(first, *command)
    until(first.runs, lambda: len(records(out)) >= 2, said)
    assert worlds(out) == [2], said()
    begun = time.monotonic()
    second.lose()
    until(first.runs, lambda: len(worlds(out)) == 2 and len(records(out)) >= 4, said)
    print(f"alone after {time.monotonic() - begun:.1f} s")
    (alone,) = first.ranks()
    os.kill(alone, signal.SIGSTOP)  # it must not be done before the other has come back
    second.start(first, *command)
    time.sleep(10)
    os.kill(alone, signal.SIGCONT)
    for machine in machines:
        assert machine.agents[-1].wait(240) == 0, said()
    assert worlds(out) == [2, 1, 2], said()
    assert [row["step"] for row in records(out)] == list(range(1, STEPS + 1))
    assert_same(out, whole)
    assert json.loads((out / "summary.json").read_text())["lower_steps"] == STEPS
