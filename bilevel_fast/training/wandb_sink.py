"""Weights & Biases beside TensorBoard: the same scalars over the same images, for `train --wandb`.

A student and its twin are two runs of one group, which is named after the run folder. What W&B keeps on this machine
lies in `RUN/wandb/`, among it `NAME.id`, by which a run that is resumed goes on in the same place. Its environment
variables hold: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY, ...
"""

import logging
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bilevel_fast.base.errors import require
from bilevel_fast.base.files import read_file, write_atomic
from bilevel_fast.training.stats import Record, scalars

_log = logging.getLogger(__name__)


class WandbSink:
    """Sends records to a run of W&B. Whatever it fails at, one line says so and the training goes on without it.

    Args:
        folder: The run folder.
        name: Of the student in it.
        config: Settings of the run, to be shown beside its curves.
        images: Where the run goes on from; W&B draws over images, so what is sent again lies on what was.

    Raises:
        UserError: The package is not installed.
    """

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], images: int = 0) -> None:
        self._run: Any = None
        wandb: Any = require("wandb", "wandb")
        self._try(lambda: self._begin(wandb, folder, name, config))

    def write(self, record: Record) -> None:
        self._try(lambda: self._run.log(scalars(record) | {"images": record["images"]}))

    def close(self) -> None:
        if self._run is not None:
            self._try(self._run.finish)

    def _begin(self, wandb: Any, folder: Path, name: str, config: Mapping[str, Any]) -> None:
        group, file = folder.resolve().name, folder / "wandb" / f"{name}.id"
        before = file.is_file()
        number = read_file(file).decode() if before else uuid.uuid4().hex[:12]
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "bilevel-fast"),
            dir=str(folder),
            id=number,
            name=f"{group}-{name}",
            group=group,
            config=dict(config),
            resume="allow" if before and os.environ.get("WANDB_MODE") != "offline" else None,
            settings=wandb.Settings(console="off"),  # our lines stay ours
        )
        run.define_metric("*", step_metric="images")
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, number.encode())
        self._run = run

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # a server, a process of its own, a disk: none of them is worth a training
            said = " ".join(str(error).split()) or type(error).__name__
            _log.warning("no more is sent to Weights & Biases: %s", said)
            self._run = None
            self._try = lambda call: None
