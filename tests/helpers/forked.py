"""Commands in processes of their own, to be killed, without the seconds that importing torch takes each time.

They are forked from a server that has imported what they need and has no threads: a child of the test process itself
would have torch's OpenMP pool without its threads, and wait for ever.
"""

import contextlib
import importlib
import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel_fast.base import errors
from mishap import Fault

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["bilevel_fast.runs.session", "bilevel_fast.sampling.to_folder", "transformers", "tyro", "nvidia.dali"]
)


class Started:
    """`python -m bilevel_fast.NAME ARGUMENTS`, running.

    Args:
        name: An entry point of the package.
        arguments: As a user types them.
        log: The file that gets standard output and standard error.
        environment: Variables that it finds set.
        package: Of the module; a helper of the tests has none, and a benchmark says its own.
        fault: What happens to it.
    """

    def __init__(
        self,
        name: str,
        *arguments: Any,
        log: Path,
        environment: Mapping[str, str] | None = None,
        package: str = "bilevel_fast.",
        fault: Fault | None = None,
    ):
        self.log = log
        log.touch()
        words = [str(argument) for argument in arguments]
        module = name if name.startswith("benchmarks.") else package + name
        self._process = processes.Process(target=_run, args=(module, words, log, dict(environment or {}), fault))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def runs(self) -> bool:
        return self._process.is_alive()

    def said(self) -> str:
        """What it has printed so far."""
        return self.log.read_text()

    def send(self, signal: int) -> None:
        """Nothing happens to one that has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal)

    def wait(self, seconds: float | None = None) -> int:
        """The exit status, once it has ended; minus the signal that killed it."""
        self._process.join(seconds)
        assert self._process.exitcode is not None
        return self._process.exitcode


def _run(name: str, arguments: list[str], log: Path, environment: dict[str, str], fault: Fault | None) -> None:
    os.environ.update(environment)
    with log.open("ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    module = importlib.import_module(name)
    sys.argv = [name, *arguments]
    if fault is not None:
        fault.install()
    raise SystemExit(errors.run(module.main))
