"""Commands without a process of their own: what a user types, and what comes of it."""

import contextlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bilevel_fast.base import errors


def run_command(main: Callable[[], None], *arguments: Any, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Exit code, standard output and standard error, log lines among it, of an entry point run in this process."""
    words = [main.__module__, *map(str, arguments)]
    out, err, log = io.StringIO(), io.StringIO(), logging.getLogger()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", words)
        patch.setattr(log, "handlers", [])  # `logging.basicConfig` adds one that writes to `err`
        patch.setattr(log, "level", log.level)
        if cwd is not None:
            patch.chdir(cwd)
        try:
            code = errors.run(main)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def module_command(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """`python -m bilevel_fast.NAME` in a process, as a user starts it."""
    command = [sys.executable, "-m", f"bilevel_fast.{name}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
