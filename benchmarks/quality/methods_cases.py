"""The students that `benchmarks.quality.methods` compares."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import ModelFolder, load_unet
from bilevel_fast.models.macs import count
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning import FIXED, METHODS, MacBudget, calibration_set, method, reinitialise
from bilevel_fast.pruning.calibration import IMAGES
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.runs.sources import image_source
from bilevel_fast.training.losses import LossWeights

BUDGETS = (0.80, 0.55)
FIGURES = 0.55
JUDGED = (100, 300)  # steps at which the figures' cases draw as well
PLAIN, RANDOM, DIFFUSION, DISTILLATION = "magnitude", "random weights", "diffusion only", "distillation only"
WEIGHTS = {DIFFUSION: LossWeights(output=0.0, feature=0.0), DISTILLATION: LossWeights(diffusion=0.0)}


@dataclass(frozen=True)
class Case:
    """One student: how it is made, what it is trained on, and at which steps it draws besides the first and last."""

    name: str
    make: Callable[[], UNet]
    weights: LossWeights
    judged: Sequence[int] = ()


def cases(
    budget: float, extra: Sequence[str], config: TrainConfig, folder: ModelFolder, teacher: UNet
) -> Iterator[Case]:
    """Every case of a budget and of the seed of `config`, nothing of it made yet.

    Raises:
        UserError: An `extra` is not NAME=FOLDER. What is wrong with the folder is said when the student is made.
    """
    latent, text, usual = folder.config.sample_size, folder.text_encoder.length, config.lower.weights
    calibration = calibration_set(folder, image_source(folder, None, IMAGES, config.seed), seed=config.seed)
    figures = JUDGED if budget == FIGURES else ()

    def cut(name: str) -> UNet:
        limit = MacBudget(1.0 if name in FIXED else budget, latent, text)
        return teacher.cut(method(name)(teacher, limit, calibration))

    for name in METHODS:
        if name not in FIXED:
            judged = figures if name == PLAIN else ()
            yield Case(f"{budget:.2f} {name}", lambda name=name: cut(name), usual, judged)
            continue
        try:
            ratio = count(cut(name).structure, latent, text).ratio
        except UserError as error:  # BK-SDM-Base drops nothing where a block has one layer
            print(error, file=sys.stderr)
            continue
        if budget == min((b for b in BUDGETS if ratio <= b), default=max(BUDGETS)):
            yield Case(name, lambda name=name: cut(name), usual)
    yield Case(f"{budget:.2f} {RANDOM}", lambda: reinitialise(cut(PLAIN), config.seed), usual, figures)
    for name, weights in WEIGHTS.items() if figures else ():
        yield Case(f"{budget:.2f} {name}", lambda: cut(PLAIN), weights, figures)
    for given in extra:
        name, _, path = given.partition("=")
        if not name or not path or name in METHODS:
            raise UserError(f"--extra {given}: wanted NAME=FOLDER, with a name that no method has")
        path = path.replace("{seed}", str(config.seed))
        yield Case(f"{budget:.2f} {name}", lambda path=path: student_of(path, folder), usual)


def student_of(path: str, folder: ModelFolder) -> UNet:
    """The student in a model folder; refuses one of another teacher."""
    student = load_unet(path)
    if student.config != folder.config:
        raise UserError(f"{path} was not made from {folder.path}: their UNets differ")
    return student
