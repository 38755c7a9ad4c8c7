"""Many prompts to a folder of images by id: batched, resumable, by any number of processes.

The noise of an image is a pure function of its seed and its id. Batches are filled up, so that the networks see one
shape only: with the same batch size, on the same kind of device, an image has the same bits whatever else is drawn, in
which order, by how many processes, and however often they are killed. Measured on CPUs, where that holds for batches
that their threads divide evenly (16 by 2, say, not 3 by 2). Another batch size or device changes the last bits only.

A UNet on a GPU is replayed as a CUDA graph; images are encoded and written by threads while the next ones are sampled.

Shape legend: B batch, C channels, h w latents, H W image.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from bilevel_fast.base.devices import Ranks, compute_dtype, pick_device
from bilevel_fast.base.errors import UserError, nearest
from bilevel_fast.base.limits import LATENTS
from bilevel_fast.models.folder import ModelFolder
from bilevel_fast.models.weights import fingerprint
from bilevel_fast.ops.graphs import cuda_recorder, side_stream
from bilevel_fast.ops.randomness import Stream, normal
from bilevel_fast.sampling.captured import Captured
from bilevel_fast.sampling.image_folder import ImageFolder, ImageWriter
from bilevel_fast.sampling.painter import Load, load_painter
from bilevel_fast.sampling.pictures import to_pixels
from bilevel_fast.sampling.prompts import Row
from bilevel_fast.sampling.safe import safe_of
from bilevel_fast.sampling.samplers import Method, checked_grid, guided, sample
from bilevel_fast.sampling.strength import Strength

Format = Literal["png", "latents"]
Precision = Literal["auto", "fp32", "bf16"]

_DECODED = 4  # images at a time: a VAE needs about 1 GB for one of 512 pixels
_THREADS = 4


@dataclass(frozen=True)
class Recipe:
    """What decides the images, but for the model and the prompts."""

    steps: int = 25
    """Sampling steps."""
    guidance: float | None = None
    """Classifier-free guidance scale. Default: 3 for the mini world, 5 for Stable Diffusion XL, else 7.5."""
    method: Method = "pndm"
    """Sampler."""
    seed: int = 0
    """Of all rows that have none of their own."""
    size: int | None = None
    """Height and width of the latents. Default: what the model was made for, 64 (512 pixels) at most but for XL."""
    precision: Precision = "auto"
    """What the UNet computes in: by default bf16 on a GPU that has it (sm_80 and later), else fp32. The text encoder
    and the VAE compute in fp32."""
    format: Format = "png"
    """PNG pictures, or latents as safetensors."""
    safe: str | None = None
    """Text of a concept to keep away from (Safe Latent Diffusion); it wants a third row for each prompt."""
    safe_strength: Strength | None = None
    """How hard. Default: medium, with a concept."""

    def of(self, folder: ModelFolder, device: torch.device) -> "Recipe":
        """With the defaults filled in, for a model and a device to draw on: what is drawn says what it was drawn in.

        Raises:
            UserError: A value is none that this model can be sampled with.
        """
        for name, kind in (("precision", Precision), ("format", Format)):
            if (value := getattr(self, name)) not in (known := get_args(kind)):
                raise UserError(f"{name} {value!r} does not exist{nearest(value, known)}")
        guidance = folder.family.guidance if self.guidance is None else float(self.guidance)
        if not math.isfinite(guidance):
            raise UserError(f"guidance is {guidance}; wanted a finite number")
        largest = min(folder.config.sample_size, folder.family.largest_latent or folder.config.sample_size)
        size = largest if self.size is None else self.size
        stride = 2 ** (len(folder.config.block_out_channels) - 1)
        check_size(size, stride)
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed is {self.seed}; it must be in [0, 2**64)")
        checked_grid(folder.schedule, self.steps, self.method)
        half = compute_dtype(self.precision, device) == torch.bfloat16
        if (safe := safe_of(self.safe, self.safe_strength)) is not None:
            safe.check(self.steps)
            self = replace(self, safe_strength=safe.strength)
        return replace(self, guidance=guidance, size=size, precision="bf16" if half else "fp32")


def check_size(size: int, stride: int) -> None:
    """Refuse a size of latents that the UNet cannot halve so often, or that no machine has the memory for.

    Raises:
        UserError: Says what it must be.
    """
    if not 1 <= size <= LATENTS or size % stride:
        raise UserError(
            f"latent size is {size}; it must be a multiple of the UNet's stride {stride}, {LATENTS} at most"
        )


def sample_folder(
    model: Path | str,
    rows: Sequence[Row],
    out: Path | str,
    recipe: Recipe = Recipe(),
    *,
    batch: int = 16,
    device: str = "auto",
    ranks: Ranks | None = None,
    load: Load = load_painter,
    graphs: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ImageFolder:
    """Draw an image for each row into a folder, and read it. Finished images are kept; called again, it goes on.

    Args:
        model: A folder that `load` loads; by default a model folder, dense or pruned.
        rows: All images, of all processes.
        out: The folder; new, or begun with the same recipe, model and prompts.
        recipe: How.
        batch: Prompts per call of the UNet, which sees twice as many rows unless guidance is 1, thrice with `safe`.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto` takes a GPU if there is one, its own in each process of a machine.
        ranks: This process draws rows rank, rank + world, ...; by default what torchrun says. Processes do not wait
            for each other: the folder is complete when the last one has returned.
        load: Loads what draws.
        graphs: Replay the UNet as a CUDA graph on a GPU.
        progress: Called with the images done and to do, of this process.

    Raises:
        UserError: Bad input of any kind, or an image is not finite. Images that are finished stay.
        OSError: The disk is full, say; likewise.
    """
    model, out = Path(model), Path(out)
    if not rows:
        raise UserError("there is no prompt to draw")
    if batch < 1:
        raise UserError(f"batch is {batch}; wanted at least 1")
    ranks = Ranks.from_environment() if ranks is None else ranks
    place = pick_device(ranks.device(device))
    painter = load(model, place)
    folder = painter.folder
    recipe = recipe.of(folder, place)
    if folder.family.closed_vocabulary:
        folder.text_encoder.mask(
            [row.prompt for row in rows] + ([] if recipe.safe is None else [recipe.safe])
        )  # it has few words: refuses others before the first image
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    run = {"batch": batch, "device": name, "torch": torch.__version__}
    others = {name: fingerprint(folder.path / name) for name in (*folder.family.text_encoders, "vae", "scheduler")}
    made_by = {**asdict(recipe), **painter.fingerprints(), **others}
    writer = ImageWriter.begin(out, rows, made_by, model=str(model), run=run)
    todo = [row for row in ranks.share(rows) if row.id not in writer.finished]
    done = 0
    with contextlib.ExitStack() as stack:
        if place.type == "cuda":
            stack.enter_context(side_stream(place))
        saver = stack.enter_context(_Saver(writer, recipe.format))
        for numbers, unet, _ in painter.parts([row.prompt for row in todo]):
            part = [todo[n] for n in numbers]
            unet = unet.to(place, torch.bfloat16 if recipe.precision == "bf16" else torch.float32).requires_grad_(False)
            # a pool of its own: what one expert's graph has used is free for the next one's
            captured = Captured(unet, cuda_recorder(place) if graphs else None)
            for start in range(0, len(part), batch):
                chunk = part[start : start + batch]
                try:
                    images = _draw(captured, folder, recipe, chunk, batch, place)
                except torch.OutOfMemoryError as error:
                    raise UserError(f"{place} is out of memory for a batch of {batch}; finished images stay") from error
                saver.save(chunk, images)
                done += len(chunk)
                if progress:
                    progress(done, len(todo))
            del unet, captured
    return writer.finish()


def noise_index(id: str) -> int:
    """The sample index whose noise an image starts from: its id if that is a number, else 63 bits of its SHA-256."""
    if id.isascii() and id.isdigit() and str(int(id)) == id and int(id) < 2**63:
        return int(id)
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") >> 1


def noise(rows: Sequence[Row], seed: int, shape: tuple[int, ...]) -> Tensor:
    """Initial noise (B, *shape), fp32 on the CPU: each row's depends on its seed and its id alone.

    Args:
        rows: B.
        seed: Of rows that have none of their own.
        shape: (C, h, w).
    """
    seeds = [seed if row.seed is None else row.seed for row in rows]
    one = [normal(s, Stream.INITIAL, [noise_index(row.id)], shape) for s, row in zip(seeds, rows, strict=True)]
    return torch.cat(one)


def _draw(
    unet: Captured, folder: ModelFolder, recipe: Recipe, rows: Sequence[Row], batch: int, device: torch.device
) -> Tensor:
    """Latents (B, C, h, w) fp32 or pictures (B, H, W, 3) uint8 of some rows, on the CPU.

    Raises:
        UserError: The latents of a row are not finite.
    """
    assert recipe.size is not None
    assert recipe.guidance is not None
    filled = [*rows, *[rows[-1]] * (batch - len(rows))]
    text = folder.text_encoder.encode([row.prompt for row in filled]).to(device)
    null = folder.text_encoder.encode([""]).to(device)
    shape = (folder.config.in_channels, recipe.size, recipe.size)
    x_T = noise(filled, recipe.seed, shape).to(device)
    predict = guided(unet, text, null, recipe.guidance)
    if (safe := safe_of(recipe.safe, recipe.safe_strength)) is not None:
        predict = safe.predictor(unet, text, null, folder.text_encoder, recipe.guidance, folder.schedule)
    latents = sample(predict, x_T, folder.schedule, recipe.steps, recipe.method)
    finite = latents.isfinite().flatten(1).all(1).tolist()
    for row, good in zip(rows, finite, strict=False):
        if not good:
            raise UserError(
                f"image {row.id!r} ({row.prompt!r}) is not finite in {recipe.precision}; nothing is written"
            )
    if recipe.format == "latents":
        return latents[: len(rows)].cpu()
    some = next(n for n in range(min(_DECODED, batch), 0, -1) if batch % n == 0)  # of one shape, too
    pictures = [to_pixels(folder.vae.decode(part)).cpu() for part in latents.split(some)]
    return torch.cat(pictures)[: len(rows)]


class _Saver:
    """Writes images by threads, one batch behind; the index knows those that are on disk."""

    def __init__(self, writer: ImageWriter, format: Format):
        self._pool = ThreadPoolExecutor(_THREADS)
        self._finish = writer.add
        self._one: Callable[[str, Tensor], None] = writer.save_picture if format == "png" else writer.save_latents
        self._pending: list[tuple[str, Future[None]]] = []

    def __enter__(self) -> "_Saver":
        return self

    def save(self, rows: Sequence[Row], images: Tensor) -> None:
        self._flush()
        self._pending = [(row.id, self._pool.submit(self._one, row.id, x)) for row, x in zip(rows, images, strict=True)]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._flush()
        except Exception:
            if kind is None:  # else what went wrong first is said
                raise
        finally:
            self._pool.shutdown()

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        failures = {name: future.exception() for name, future in pending}  # waits for them
        self._finish([name for name, failure in failures.items() if failure is None])
        for failure in failures.values():
            if failure is not None:
                raise failure
