"""What the processes of `tests/sampling` do: forked from a server that has imported the engine (`forked.py`)."""

import resource
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bilevel_fast.base.devices import Ranks
from bilevel_fast.sampling.image_folder import ImageWriter
from bilevel_fast.sampling.prompts import Row
from bilevel_fast.sampling.to_folder import Recipe, sample_folder
from bilevel_fast.worlds.mini.world import SCENES

RECIPE = Recipe(steps=3, seed=7)
BATCH = 2
CAPTIONS = [scene.caption for scene in SCENES]
ROWS = [Row(str(n), CAPTIONS[17 * n]) for n in (3, 0, 11, 4, 12)]


def content(path: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def draw(model: Path, rows: list[Row], out: Path, events: Connection, ranks: Ranks) -> None:
    """Fills the folder; sends the number of images done after each batch."""
    torch.set_num_threads(1)
    sample_folder(model, rows, out, RECIPE, batch=BATCH, ranks=ranks, progress=lambda done, _: events.send(done))


def index_with_small_files(rows: list[Row], out: Path, events: Connection, limit: int) -> None:
    """Sends what becomes of an index whose file may have `limit` bytes (the system answers EFBIG)."""
    writer = ImageWriter.begin(out, rows, {"seed": 0, "format": "png"}, model="m", run={})
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    half = len(rows) // 2
    writer.add([row.id for row in rows[:half]])
    try:
        writer.add([row.id for row in rows[half:]])
    except OSError as error:
        events.send(error.strerror)
    else:
        events.send("no error")
