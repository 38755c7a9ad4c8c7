"""The machine and versions that a measurement was made with."""

import datetime
import subprocess
from typing import Any

import torch

from bilevel_fast.base.devices import cpu_name


def describe(device: torch.device) -> dict[str, Any]:
    """Fields that every row of a benchmark carries: device, driver, versions, commit, date."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "threads": torch.get_num_threads(),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
