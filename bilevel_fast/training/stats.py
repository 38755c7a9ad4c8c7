"""Training statistics: added up on the device, read back once per status line, written to every sink.

`Means.add` never waits for the device. `Stats.flush` does, once per level, and makes a record of JSON values:

    {"step": 40, "images": 640, "seconds": 12.5, "images_per_second": 51.2,
     "nonfinite": {"lower/loss": 3}, "lower/loss": 0.044, "lr": 1e-06}

Each other key is a mean over the finite values since the last record, or null if there were none; `nonfinite`
counts the others, so a NaN is neither hidden nor able to hide the rest, and the record is always valid JSON.
"""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TextIO

import torch
from torch import Tensor

from bilevel_fast.base.files import append, parse_json, whole, write_atomic
from bilevel_fast.base.progress import Bar

Record = dict[str, Any]

_HEADER = ("step", "images", "seconds", "images_per_second", "nonfinite")

_LAYOUT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}"

_log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Means:
    """Means of named scalars, added up on the device: in place, without a wait, so a CUDA graph may hold it.

    Every call of `add` brings the same names, from the same device.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._moments = torch.zeros(0)

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Count each term, a tensor of one element, into the mean of its name.

        Raises:
            ValueError: Other names than at the first call.
        """
        x = torch.stack([value.detach().reshape(()).double() for value in terms.values()])
        if not self._names:
            assert not (taken := terms.keys() & set(_HEADER)), f"{taken} are fields of every record"
            # finite count, finite sum, non-finite count, in fp64
            self._names, self._moments = tuple(terms), x.new_zeros(3, len(terms))
        if tuple(terms) != self._names:
            raise ValueError(f"terms {', '.join(terms)}; before: {', '.join(self._names)}")
        finite = x.isfinite()
        self._moments.add_(torch.stack((finite.double(), x.where(finite, 0.0), (~finite).double())))

    def take(self) -> tuple[dict[str, float | None], dict[str, int]]:
        """Means of the finite values, and how many were not finite, since the last call: one transfer. Starts anew."""
        counts, sums, bads = self._moments.tolist() if self._names else ([], [], [])
        self._moments.zero_()
        every = list(zip(self._names, counts, sums, bads, strict=True))
        seen = [row for row in every if row[1] or row[3]]
        means = {name: total / count if count else None for name, count, total, _ in seen}
        return means, {name: int(bad) for name, _, _, bad in seen if bad}


class Stats:
    """Records of what the training loop measures, and its speed in images.

    Args:
        sinks: Get every record; closed with the Stats.
        images: Seen before, when a run is resumed.
        seconds: Spent before, when a run is resumed.
    """

    def __init__(self, sinks: Sequence[Sink] = (), *, images: int = 0, seconds: float = 0.0) -> None:
        self._sinks = sinks
        self._images = images
        self._time = time.perf_counter()
        self._start = self._time - seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self._sinks:
            sink.close()

    def flush(self, step: int, images: int, means: Iterable[Means] = (), **values: Tensor | float) -> Record:
        """Read everything back, write a record to the sinks, and start anew.

        Args:
            step: Lower steps done.
            images: Images seen since the beginning of the run.
            means: What has been added up since the last record.
            values: Numbers of this moment, such as the learning rate.
        """
        found: dict[str, float | None] = {}
        nonfinite: dict[str, int] = {}
        for mean in means:
            taken, bad = mean.take()
            found, nonfinite = found | taken, nonfinite | bad
        for name, value in values.items():
            number = float(value)
            found[name] = number if math.isfinite(number) else None
            nonfinite |= {} if math.isfinite(number) else {name: 1}
        now = time.perf_counter()  # After the read: all the work that is being timed is done.
        rate = (images - self._images) / (now - self._time)
        header = (step, images, round(now - self._start, 3), round(rate, 3), nonfinite)
        record = dict(zip(_HEADER, header, strict=True)) | found
        self._images, self._time = images, now
        for sink in self._sinks:
            sink.write(record)
        return record


class Console:
    """A progress bar on a terminal, otherwise one plain line per record.

    Args:
        total: Steps of the whole run.
        step: Steps done before, when a run is resumed.
        stream: Standard error if None.
    """

    def __init__(self, total: int, step: int = 0, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._total = total
        self._bar = Bar("step", self._stream, _LAYOUT)
        self._bar(step, total)

    def at(self, step: int) -> None:
        """A step is done."""
        self._bar(step, self._total)

    def write(self, record: Record) -> None:
        names = [name for name in record if name not in _HEADER]
        rate = f"{record['images_per_second']:.1f} img/s"
        if self._bar.shown:
            names.sort(key=lambda name: not name.endswith("/loss"))  # what a narrow terminal cuts off is the rest
            values = "  ".join(f"{name} {_shown(record, name)}" for name in names)
            self._bar(record["step"], self._total, f"{rate}  {values}")
            return
        values = "  ".join(f"{name} {_shown(record, name)}" for name in names)
        head = f"step {record['step']}/{self._total}  {record['images']} images  {rate}"
        print(f"{head}  {values}", file=self._stream, flush=True)

    def close(self) -> None:
        self._bar.close()


class JsonLines:
    """One JSON object per line, in the file as soon as it is written.

    Args:
        path: Appended to; lines of steps after `step`, and a line cut off by a kill, are dropped first.
        step: The step that the run goes on from, 0 for a new one.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        _keep_until(path, step)
        self.path = path

    def write(self, record: Record) -> None:
        append(self.path, (json.dumps(record, allow_nan=False) + "\n").encode(), durable=False)

    def close(self) -> None:
        pass


def scalars(record: Record) -> dict[str, float]:
    """What a record has to plot over its images, by name."""
    found = {name: value for name, value in record.items() if name not in ("images", "nonfinite") and value is not None}
    return found | {f"nonfinite/{name}": count for name, count in record["nonfinite"].items()}


class TensorBoard:
    """Event files with images on the x axis; needs the tensorboard package (see `tensorboard`).

    Args:
        folder: Of event files; those of a run that is resumed stay.
        images: Where the run goes on from: TensorBoard hides older events from there on.
    """

    def __init__(self, folder: Path, images: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=images + 1 if images else None, flush_secs=10)

    def write(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["images"])

    def close(self) -> None:
        self._writer.close()


class Nowhere:
    """The sink that takes everything and keeps nothing."""

    def write(self, record: Record) -> None:
        pass

    def close(self) -> None:
        pass


def tensorboard(folder: Path, images: int = 0) -> Sink:
    """A TensorBoard sink, or, without the package, one log line that says so and a sink that does nothing."""
    try:
        return TensorBoard(folder, images)
    except ModuleNotFoundError as error:
        if error.name != "tensorboard":
            raise
        _log.warning("no TensorBoard events: tensorboard is not installed; run: pip install tensorboard")
        return Nowhere()


def _shown(record: Record, name: str) -> str:
    mean, bad = record[name], record["nonfinite"].get(name, 0)
    return ("-" if mean is None else f"{mean:.4g}") + (f" ({bad} non-finite)" if bad else "")


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines that a run going on from `step` will write again, and those that are not records."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for number, line in enumerate(lines, 1) if _step_of(path, number, line) <= step]
    if kept != lines:
        write_atomic(path, b"".join(kept))


def _step_of(path: Path, number: int, line: bytes) -> float:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if line.endswith(b"\n"):
            return whole(parse_json(line, "")["step"], "", 0, 2**63)
    _log.warning("%s line %d is not a whole record and is dropped", path, number)
    return float("inf")
