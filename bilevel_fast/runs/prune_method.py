"""`python -m bilevel_fast.prune METHOD`: a dense model folder, cut to a budget by one method."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from bilevel_fast.base.claims import claimed
from bilevel_fast.base.devices import pick_device
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import ModelFolder, load_folder, save_student
from bilevel_fast.models.macs import Macs, count
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning import (
    FIXED,
    LatencyBudget,
    MacBudget,
    Method,
    calibration_set,
    dense,
    described,
    method,
    read_latencies,
    reinitialise,
)
from bilevel_fast.pruning.latency import RESOLUTION
from bilevel_fast.pruning.picture import picture
from bilevel_fast.runs.sources import image_source
from bilevel_fast.worlds.mini import TEACHER

BUDGET = 0.8
"""Of a method that needs one, if none is given."""

Name = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(help="\n\n".join(f"{n}: {d}" for n, d in described().items()))
]


@dataclass(frozen=True)
class Args:
    """Prune a dense model to a MAC budget, show what is kept, and write the student's model folder."""

    MAIN: ClassVar = ("out", "teacher", "budget", "latency", "latent", "data", "seed", "device")

    method: Name
    out: Path
    """Folder for the student; must be new."""
    teacher: Path = TEACHER
    """Dense model folder in the diffusers layout, or its id on the hub; `mini` and `emoji` are the
    built-in teachers. Default: mini."""
    budget: float | None = None
    """MACs of the student as a share of the teacher's: never more, and as close as whole units allow. By default 0.8,
    and for a method that is a shape, such as BK-SDM's, whatever it costs."""
    latency: Path | None = None
    """Rows of `benchmarks.speed.unet --sites` or `benchmarks.counts.roofline_sites`: the budget is then a share of the
    time that the sites take by them."""
    latency_batch: int | None = None
    """Use the rows of this batch, if there are those of several."""
    latent: int | None = None
    """Height and width of the latents to count at; by default the UNet's sample size."""
    text: int | None = None
    """Text tokens to count at; by default the length of the text encoder."""
    data: Path | None = None
    """Latent cache to try the teacher on, for methods that do; the mini world draws its own images."""
    images: int = 64
    """How many images the teacher is tried on, at most."""
    batch: int = 16
    """Images at a time."""
    seed: int = 0
    """Of everything random."""
    random_init: bool = False
    """Write random weights in the shape of the student: what a model of that shape begins with, not what is left."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one."""


@dataclass(frozen=True, eq=False)
class Pruned:
    """A student that was cut and written.

    Attributes:
        path: Its model folder.
        unet: The student, fp32.
        macs: What it takes, at the sizes that the budget was counted at.
        page: What the command prints.
    """

    path: Path
    unet: UNet
    macs: Macs
    page: str


def prune(args: Args, folder: ModelFolder | None = None) -> Pruned:
    """Prune the teacher and write the student's folder.

    Args:
        args: The settings.
        folder: The teacher, if it is loaded already: in place of `args.teacher`.

    Raises:
        UserError: Bad input of any kind, or the budget cannot be met.
    """
    choose = method(args.method)
    with claimed(args.out):
        return _prune(args, choose, folder)


def _prune(args: Args, choose: Method, folder: ModelFolder | None) -> Pruned:
    device = pick_device(args.device)
    folder = folder or load_folder(args.teacher, device)
    if folder.structure is not None:
        raise UserError(f"{folder.path} is pruned already; wanted a dense model")
    latent = folder.config.sample_size if args.latent is None else args.latent
    text = folder.text_encoder.length if args.text is None else args.text
    ratio = args.budget
    if ratio is None:
        ratio = 1.0 if args.method in FIXED else BUDGET
    timed = None
    if args.latency is not None:
        timed = read_latencies(args.latency, folder.config, args.latency_batch)
    elif args.latency_batch is not None:
        raise UserError("--latency-batch says which rows of --latency to use, and there is no --latency")
    budget = MacBudget(ratio, latent, text) if timed is None else LatencyBudget(ratio, timed)
    prices = budget.prices(folder.config)
    source = image_source(folder, args.data, args.images, args.seed)
    calibration = calibration_set(folder, source, images=args.images, batch=args.batch, seed=args.seed, device=device)
    teacher = dense(args.method, folder).to(device).requires_grad_(False)
    structure = choose(teacher, budget, calibration)
    student = teacher.cut(structure)
    if args.random_init:
        reinitialise(student, args.seed)
    save_student(args.out, folder, student)

    whole, left = count(Structure.dense(folder.config), latent, text), count(structure, latent, text)
    limit = f", fixed by {args.method}" if args.budget is None and args.method in FIXED else f", budget {ratio:g}"
    lines = [picture(structure, prices), "", f"latents {latent}x{latent}, {text} text tokens"]
    if timed is not None:
        taken = prices.of(structure)
        change = f"{prices.dense / RESOLUTION:.4g} ms -> {taken / RESOLUTION:.4g} ms"
        lines.append(f"time        {change}: {taken / prices.dense:.4f}{limit}")
        lines.append(f"            of the sites alone, by {args.latency}: {timed.settings}")
        limit = ""
    lines.append(f"MACs        {whole.true / 1e9:.3f} G -> {left.true / 1e9:.3f} G: {left.ratio:.4f}{limit}")
    lines.append(f"parameters  {whole.params:,} -> {left.params:,}")
    if args.random_init:
        lines.append(f"weights     random, seed {args.seed}")
    lines.append(f"written     {args.out}")
    return Pruned(args.out, student, left, "\n".join(lines))
