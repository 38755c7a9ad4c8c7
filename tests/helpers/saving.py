"""What the processes of `test_checkpoint` do, forked from the server of `forked.py`."""

import resource
import time
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.training.checkpoint import GracefulStop, latest, save
from bilevel_fast.training.saver import Pinned, Saver


def content(step: int) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], dict[str, Any]]:
    """What a run has at `step`, as a pure function of it: (tensors, optimizers, state)."""
    weight = torch.arange(64, dtype=torch.float32) * 0.1 + step
    moments = {"step": torch.tensor(float(step)), "exp_avg": weight / 3, "exp_avg_sq": weight.square()}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 1e-6, "betas": (0.9, 0.999), "params": [0]}]}
    return {"weight": weight}, {"lower": optimizer}, {"images": 16 * step, "note": "é"}


def save_behind(folder: Path, *content: Any) -> None:
    """`save` by a thread, from a snapshot."""
    with Saver(folder, Pinned(torch.device("cpu"))) as saver:
        saver.save(*content)


SAVES = (save, save_behind)


def save_for_ever(folder: Path, events: Connection, how: int) -> None:
    checkpoint = latest(folder)
    for step in count(checkpoint.step + 1 if checkpoint else 1):
        events.send(("began", step))
        SAVES[how](folder, step, *content(step))
        events.send(("ended", step))


def save_with_small_files(folder: Path, events: Connection, weights: int, moments: int, how: int) -> None:
    """Sends the error of a `save` whose files may have 100,000 bytes at most (the system answers EFBIG)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        SAVES[how](folder, 3, {"w": torch.ones(weights)}, {"lower": {"m": torch.ones(moments)}}, {})
    except UserError as error:
        events.send(str(error))
    else:
        events.send("no error")


def step_until_stopped(folder: Path, events: Connection) -> None:
    with GracefulStop() as stop:
        step = 0
        while not stop.requested:
            time.sleep(0.02)
            step += 1
            events.send(step)
        save(folder, step, *content(step))
