"""Is a planned cut better than an even one? Output error at the same MACs and with the same score, before any training.

    python -m benchmarks.quality.planner            measures, and appends to benchmarks/results/planner.jsonl
    python -m benchmarks.quality.planner --no-write

The mini world's teacher loses the least important units of each width vector: by the magnitude of their weights, or by
how much the diffusion loss depends on them (`taylor`). How many of each vector stay is what differs:

    even              the same share of every one (`bilevel_fast.pruning.uniform`)
    planned shares    `bilevel_fast.pruning.planner.spend`: the largest product of kept shares
    planned sum       the same: the smallest sum of what is lost

The error is the mean squared difference of prediction between student and teacher, on noised drawings with captions,
over the mean square of the teacher's. Every batch has other drawings, captions, noise and timesteps, the same for both;
20 % and 80 % are over batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.machine import describe
from benchmarks.quality import lab
from benchmarks.rows import Row
from bilevel_fast.base import errors, flags
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import ModelFolder, load_folder
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.unet import UNet
from bilevel_fast.ops.randomness import Stream, integers
from bilevel_fast.pruning.budget import MacBudget, choices
from bilevel_fast.pruning.calibration import calibration_set
from bilevel_fast.pruning.magnitude import unit_importance
from bilevel_fast.pruning.planner import Importance, Objective, spend
from bilevel_fast.pruning.taylor import taylor_importance
from bilevel_fast.pruning.uniform import uniform
from bilevel_fast.runs.sources import image_source
from bilevel_fast.worlds.mini import TEACHER
from bilevel_fast.worlds.mini.world import SCENES

ROWS = RESULTS / "planner.jsonl"
RATIOS = (0.80, 0.55)
SEED = 0
EVEN = "even"
OBJECTIVES: tuple[Objective, ...] = ("shares", "sum")
_FROM = 1 << 45  # sample indices that nobody trains on, calibrates on or judges by


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement."""

    batches: int = 16
    """Batches to compare the outputs on."""
    batch: int = 32
    """Images per batch."""
    images: int = 64
    """Images that the Taylor score is computed on."""
    write: bool = True
    """Append the rows to benchmarks/results/planner.jsonl."""


@dataclass(frozen=True)
class Trial:
    """What teacher and student are asked."""

    x: Tensor  # (B, 12, 16, 16) noised latents
    t: Tensor  # (B,)
    text: Tensor  # (B, L, D)


def trials(folder: ModelFolder, settings: Settings) -> Iterator[Trial]:
    """The batches, functions of `SEED` and of their number alone."""
    for n in range(settings.batches):
        indices = range(_FROM + n * settings.batch, _FROM + (n + 1) * settings.batch)
        scenes = integers(SEED, Stream.CAPTION, indices, len(SCENES)).tolist()
        noised, text = lab.noised(folder, scenes, indices)
        yield Trial(noised.x, noised.t, text)


def magnitude_importance(teacher: UNet) -> Importance:
    """The magnitude of every unit, as `bilevel_fast.pruning.magnitude` has it."""
    state, found = teacher.state_dict(), dict[str, dict[str, Tensor]]()
    for choice in choices(teacher.config, MacBudget(1.0, 16, 12))[0]:
        found.setdefault(choice.site.name, {})[choice.width.name] = unit_importance(choice, state)
    return found


def even(teacher: UNet, budget: MacBudget, score: Importance) -> Structure:
    """As many units of every vector as `uniform` keeps, the most important ones."""
    counts = uniform(teacher, budget).kept
    kept = {
        site: {
            w: tuple(sorted(score[site][w].argsort(descending=True, stable=True)[: len(k)].tolist()))
            for w, k in ks.items()
        }
        for site, ks in counts.items()
    }
    return Structure(teacher.config, kept)


def distances(teacher: UNet, student: UNet, asked: Sequence[Trial]) -> np.ndarray:
    """Relative squared error of each batch, fp64."""
    found = []
    with torch.no_grad():
        for trial in asked:
            wanted = teacher(trial.x, trial.t, trial.text).out.double()
            got = student(trial.x, trial.t, trial.text).out.double()
            found.append(((got - wanted).square().sum() / wanted.square().sum()).item())
    return np.array(found)


def cuts_of(teacher: UNet, budget: MacBudget, score: Importance) -> dict[str, Structure]:
    """The ways to spend a budget with one score, by provider."""
    cuts = {f"planned {o}": spend(teacher.config, budget, score, objective=o) for o in OBJECTIVES}
    return {EVEN: even(teacher, budget, score), **cuts}


def measure(settings: Settings) -> Iterator[Row]:
    """For each score and budget, the error of each cut, and how much smaller those of the planned ones are."""
    folder = load_folder(TEACHER)
    teacher = folder.unet().eval()
    latent, text = folder.config.sample_size, folder.text_encoder.length
    asked = list(trials(folder, settings))
    tried = calibration_set(
        folder, image_source(folder, None, settings.images, SEED), images=settings.images, seed=SEED
    )
    scores = {"magnitude": magnitude_importance(teacher), "taylor": taylor_importance(teacher, tried)}
    for name, score in scores.items():
        for ratio in RATIOS:
            cuts = cuts_of(teacher, MacBudget(ratio, latent, text), score)
            found = {cut: distances(teacher, teacher.cut(kept).eval(), asked) for cut, kept in cuts.items()}
            config = {"model": "mini", "score": name, "budget": ratio, "latent": latent, "text": text, "seed": SEED,
                      "batches": settings.batches, "batch": settings.batch, "images": settings.images}  # fmt: skip
            values = {(cut, "output_error"): (v, "of the teacher's mean square") for cut, v in found.items()}
            for cut in found.keys() - {EVEN}:
                values[cut, "times_less_error_than_even"] = found[EVEN] / found[cut], "x"
            for (cut, metric), (sample, unit) in sorted(values.items()):
                low, middle, high = np.quantile(sample, (0.2, 0.5, 0.8)).tolist()
                yield {
                    "suite": "planner", "case": f"mini {ratio:.2f} {name}", "provider": cut, "metric": metric,
                    "unit": unit, "value": middle, "p20": low, "p80": high, "config": config,
                    "macs_ratio": count(cuts[cut], latent, text).ratio, **describe(torch.device("cpu")),
                }  # fmt: skip


def main() -> None:
    settings = flags.parse(Settings, "benchmarks.quality.planner", __doc__)
    for name in ("batches", "batch", "images"):
        if (value := getattr(settings, name)) < 1:
            raise UserError(f"--{name} {value}, wanted at least 1")
    for row in measure(settings):
        where = f"{row['case']:18} {row['provider']:15} {row['metric']:27}"
        spread = f"{row['value']:.4f}  {row['p20']:.4f} .. {row['p80']:.4f}"
        print(f"{where}{spread}  at {row['macs_ratio']:.4f} of the MACs", flush=True)
        if settings.write:
            lab.append(ROWS, row)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
