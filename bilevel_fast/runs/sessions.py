"""Who worked on a run: `sessions.jsonl` in its folder, a line when a process begins, and one when it has finished.

    {"event": "begun", "time": "2026-11-30T15:53:39Z", "device", "torch", "cuda", "threads", "processes", "python",
     "version", "commit", "launch"}
    {"event": "finished", "time", "peak_gib", "peak_of": "process" or "GPU"}

A run that was killed and resumed has a line for every try. The commit is None where the package is no checkout, the
launch, torchrun's --rdzv-id, where it has none.
"""

import datetime
import json
import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import torch

import bilevel_fast
from bilevel_fast.base.devices import machine
from bilevel_fast.base.files import append, read_json_lines

RECORD = "sessions.jsonl"


def begin(run: Path, device: torch.device, processes: int = 1) -> None:
    """Note that this process works on a run, with what its numbers depend on."""
    versions = {"python": platform.python_version(), "version": bilevel_fast.__version__, "commit": commit()}
    _note(run, "begun", machine(device) | {"processes": processes} | versions | {"launch": launch()})


def finish(run: Path, device: torch.device) -> None:
    """Note that a run is over, and the most memory that this process has held: of the GPU, or else of its own."""
    if device.type == "cuda":
        peak, of = torch.cuda.max_memory_allocated(device) / 2**30, "GPU"
    else:
        peak, of = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "process"  # kilobytes on Linux
    _note(run, "finished", {"peak_gib": round(peak, 3), "peak_of": of})


def read(run: Path) -> list[dict[str, Any]]:
    """What was noted, the first line first; nothing of a run from before there were notes.

    Raises:
        UserError: A line is no JSON object.
    """
    path = run / RECORD
    return [fields for _, fields in read_json_lines(path)] if path.is_file() else []


def launch() -> str | None:
    """What torchrun calls these processes and all that it starts in their place; None without a name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name


def launches(run: Path) -> set[str]:
    """Who has begun on a run, by `launch`."""
    return {str(fields["launch"]) for fields in read(run) if fields.get("launch") is not None}


def commit(package: Path = Path(bilevel_fast.__file__).parent) -> str | None:
    """The commit of the checkout that a package lies in, `-dirty` if files differ from it.

    None without git, and where the package is not among what a repository tracks, such as a virtual environment.
    """

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(package), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=7", "--exclude=*") or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _note(run: Path, event: str, fields: dict[str, Any]) -> None:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    append(run / RECORD, (json.dumps({"event": event, "time": now, **fields}) + "\n").encode())
