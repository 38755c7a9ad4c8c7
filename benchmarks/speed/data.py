"""Images per second: DALI, a cache of latents, and the usual ways, on the same files in the same run.

    python -m benchmarks.speed.data                            makes JPEGs, measures, prints
    python -m benchmarks.speed.data --out rows.jsonl           and appends the rows

Every rival reads, decodes, scales (antialiased), cuts and mirrors all images once per round, to batches of fp32 pixels:
DALI as `prepare` does, which also looks at every file first; a torch DataLoader over PIL and torchvision; webdataset
over a tar of the same files, decoded by the same. All get one worker per core. `cache` draws batches from a cache of
64x64 latents with five captions each, as training does: memory map, choice of view and caption, a sample of the
posterior; the text encoder is left out. `cache, drawn` adds noise and timesteps. Rivals take turns within a round.

Besides images per second there are images per second of CPU time, of all processes and threads: what one core would do
if it had nothing else to do. On a machine that others use as well, that is the number to compare.
"""

import io
import multiprocessing
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.measure import Timing, interleaved
from benchmarks.rows import append_rows
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import require
from bilevel_fast.data.batches import Batches
from bilevel_fast.data.cache import Cache, Index
from bilevel_fast.data.dali import Decoder, usable_cores
from bilevel_fast.data.encode import Files, ahead, decode
from bilevel_fast.data.listing import ListedImage, Listing
from bilevel_fast.data.pictures import Framing
from bilevel_fast.data.writer import CacheWriter

Row = dict[str, Any]
SIZES = ((640, 480), (640, 427), (480, 640), (500, 375), (640, 640))  # the commonest of COCO, width x height
LATENT = (4, 64, 64)
LOADER = "torch DataLoader + PIL"
RATIO = f"dali / {LOADER}"


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark."""

    images: int = 160
    """JPEGs that are made."""
    resolution: int = 512
    """Of the pixels that come out."""
    batch: int = 32
    """Images per batch."""
    rounds: int = 7
    """Rounds that count."""
    samples: int = 2048
    """Samples of the cache, all of which are read once per round."""
    threads: int = 1
    """Of torch, which the cache uses."""
    workers: int | None = None
    """Threads of DALI, and processes of the others; by default one per core."""
    out: Path | None = None
    """Append the rows to this file."""


def make_images(folder: Path, count: int) -> list[ListedImage]:
    """Write JPEGs of the sizes and about the bytes that COCO's have."""
    from PIL import Image

    rng = np.random.default_rng(0)
    entries = []
    for key in range(count):
        width, height = SIZES[key % len(SIZES)]
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = (smooth + rng.integers(-60, 61, 3) + rng.integers(-24, 25, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{key:012d}.jpg", quality=90)
        entries.append(ListedImage(key, f"{key:012d}.jpg", (f"a photo of {key}",)))
    return entries


def through_dali(folder: Path, entries: Sequence[ListedImage], settings: Settings, workers: int) -> Iterator[Tensor]:
    """(B, 3, R, R) batches."""
    source, framing = Files(Listing(folder, tuple(entries))), Framing(settings.resolution, 0)
    decoder = Decoder(settings.resolution, 1, settings.batch, "cpu", torch.device("cpu"), workers)
    while True:
        starts = range(0, len(source), settings.batch)
        rows = (range(start, min(start + settings.batch, len(source))) for start in starts)
        yield from (part.views[0] for part in ahead(lambda r: decode(source.read(r), 1, framing, decoder), rows))


class Pictures(torch.utils.data.Dataset):
    """The usual data set: PIL, and torchvision's transforms on PIL images."""

    def __init__(self, folder: Path, entries: Sequence[ListedImage], resolution: int) -> None:
        self.files = [folder / entry.file for entry in entries]
        self.transform = transform(resolution)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.files[index].read_bytes())


def transform(resolution: int) -> Callable[[bytes], Tensor]:
    """Bytes of an image to (3, R, R) fp32 in [-1, 1]."""
    from PIL import Image
    from torchvision import transforms as tv

    steps = tv.Compose(
        [
            tv.Resize(resolution),
            tv.RandomCrop(resolution),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            tv.Normalize([0.5], [0.5]),
        ]
    )
    return lambda data: steps(Image.open(io.BytesIO(data)).convert("RGB"))


def through_loader(folder: Path, entries: Sequence[ListedImage], settings: Settings, workers: int) -> Iterator[Tensor]:
    """(B, 3, R, R) batches; worker processes stay from epoch to epoch."""
    data = Pictures(folder, entries, settings.resolution)
    loader = torch.utils.data.DataLoader(
        data, settings.batch, num_workers=workers, persistent_workers=True, multiprocessing_context="fork"
    )
    while True:
        yield from loader


def through_webdataset(tar: Path, settings: Settings, workers: int) -> Iterator[Tensor]:
    """(B, 3, R, R) batches from as many tars as there are workers, made of `tar`'s name and a number."""
    webdataset = require("webdataset", "test")
    urls = [str(tar.with_name(f"{tar.stem}-{worker}.tar")) for worker in range(workers)]
    data = webdataset.WebDataset(urls, shardshuffle=False, workersplitter=webdataset.split_by_worker)
    data = data.to_tuple("jpg").map_tuple(transform(settings.resolution)).batched(settings.batch)
    loader = webdataset.WebLoader(
        data, batch_size=None, num_workers=workers, persistent_workers=True, multiprocessing_context="fork"
    )
    while True:
        yield from (batch for (batch,) in loader)


def make_tars(folder: Path, entries: Sequence[ListedImage], parts: int) -> Path:
    """Tars of the files, each with a share; the name that theirs are made of."""
    for part in range(parts):
        with tarfile.open(folder / f"images-{part}.tar", "w") as tar:
            for entry in entries[part::parts]:
                tar.add(folder / entry.file, entry.file)
    return folder / "images.tar"


class _NoText:
    """Stands where the text encoder would be: its cost is not the cache's."""

    width, length, pooled = 1, 1, 0

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 1, 1)

    def mask(self, prompts: Sequence[str]) -> Tensor:
        return torch.ones(len(prompts), 1, dtype=torch.bool)


def make_cache(folder: Path, samples: int) -> Cache:
    """Of latents in the size of Stable Diffusion's at 512 pixels; which numbers they are changes nothing."""
    writer = CacheWriter(folder, Index("images", LATENT, vae="none"))
    values = torch.randn(32, 1, 2 * LATENT[0], *LATENT[1:], generator=torch.Generator().manual_seed(0))
    for sample in range(samples):
        writer.add(values[sample % 32], [f"caption {i} of image {sample}" for i in range(5)])
    return writer.finish()


def rivals(folder: Path, settings: Settings, workers: int) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """What to call by name, and how many images a call gives."""
    entries = make_images(folder, settings.images)
    make_tars(folder, entries, workers)
    sources = {
        "dali": through_dali(folder, entries, settings, workers),
        LOADER: through_loader(folder, entries, settings, workers),
        "webdataset": through_webdataset(folder / "images.tar", settings, workers),
    }
    batches = Batches(make_cache(folder / "cache", settings.samples), _NoText(), settings.batch, 0)
    steps = settings.samples // settings.batch
    numbers = iter(range(1 << 40))

    def pixels(batches: Iterator[Tensor]) -> None:
        left = settings.images
        while left:
            batch = next(batches)
            assert batch.shape[1:] == (3, settings.resolution, settings.resolution)
            left -= len(batch)
            assert left >= 0, "a batch lies across two epochs"

    def latents(drawn: bool) -> None:
        for _ in range(steps):
            batch = batches(next(numbers))
            assert batch.latents.shape == (settings.batch, *LATENT)
            if drawn:
                batch.drawn(0, 1000)

    calls: dict[str, Callable[[], object]] = {
        name: lambda source=source: pixels(source) for name, source in sources.items()
    }
    calls |= {"cache": lambda: latents(False), "cache, drawn": lambda: latents(True)}
    counts = dict.fromkeys(sources, settings.images) | dict.fromkeys(("cache", "cache, drawn"), steps * settings.batch)
    return calls, counts


def cpu_seconds() -> float:
    """CPU time of this process and of the workers that it has now."""
    ticks = 0
    for pid in ("self", *(str(child.pid) for child in multiprocessing.active_children())):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def clocked(call: Callable[[], object], spent: list[float]) -> Callable[[], None]:
    """The call, with its CPU time added to a list."""

    def run() -> None:
        before = cpu_seconds()
        call()
        spent.append(cpu_seconds() - before)

    return run


def measure(settings: Settings) -> list[Row]:
    """Two rows per rival, and the ratios that we promise."""
    workers = settings.workers or usable_cores()
    torch.set_num_threads(settings.threads)
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        calls, counts = rivals(Path(folder), settings, workers)
        spent: dict[str, list[float]] = {name: [] for name in calls}
        clocks = {name: clocked(call, spent[name]) for name, call in calls.items()}
        timings = interleaved(clocks, settings.rounds, warmup=1)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.jpg")) / settings.images
    shared = {
        "suite": "data",
        "load_before": before,
        "load_after": os.getloadavg()[0],
        "kilobytes": round(size / 1024, 1),
    }
    config = {"batch": settings.batch, "workers": workers}

    def row(provider: str, metric: str, unit: str, timing: Timing) -> Row:
        case = f"latents {LATENT[1]}" if provider.startswith("cache") else f"images {settings.resolution}"
        quantiles = {"value": timing.p50, "p20": timing.p20, "p80": timing.p80}
        return {
            **shared,
            "case": case,
            "provider": provider,
            "metric": metric,
            "unit": unit,
            **quantiles,
            "config": config,
        }

    rows = []
    cores = {name: Timing(tuple(spent[name][1:])) for name in timings}  # without the warm-up
    for metric, unit, found in (("img_per_s", "img/s", timings), ("img_per_core_s", "img/core s", cores)):
        for name, timing in found.items():
            rate = timing.map(lambda seconds, count=counts[name]: count / max(seconds, 1e-9))
            rows.append({**row(name, metric, unit, rate), "images": counts[name]})
    for metric, found in (("ratio", timings), ("core_ratio", cores)):
        ratio = found["dali"].times_faster_than(found[LOADER])
        rows.append({**row(RATIO, metric, "x", ratio), "images": settings.images})
    return rows


def text(row: Row) -> str:
    return f"{row['provider']:32} {row['value']:10.2f} {row['unit']:10} ({row['p20']:.2f} .. {row['p80']:.2f})"


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.speed.data", __doc__)
    rows = measure(settings)
    machine = describe(torch.device("cpu"))
    rows = [{**row, **machine} for row in rows]
    for row in rows:
        print(text(row))
    print(f"load average {rows[0]['load_before']:.1f} before, {rows[0]['load_after']:.1f} after")
    if settings.out is not None:
        append_rows(settings.out, rows)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
