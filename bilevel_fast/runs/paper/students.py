"""The models that the paper compares, each made once and kept as a model folder.

    teacher        the dense model
    distilled      pruned, then lower steps alone
    esd            distilled, then ESD (arXiv:2303.07345): as many upper steps as `bilevel` takes, and nothing else
    uce            distilled, then edited in closed form (arXiv:2308.14761)
    concept-prune  distilled, then edited by ConceptPrune (arXiv:2405.19237)
    bilevel        pruned, then lower and upper steps in turn
    bilevel-uce    the same with UCE as the upper step: a projection instead of a gradient
    sld            distilled, and kept away from the concept while sampling (arXiv:2211.05105)

All start from one pruned student and see the same lower batches. A folder that is there already is read, not made
again, so a run that was killed goes on; the two long trainings go on from their last checkpoint.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bilevel_fast.erasing.concept_prune import ConceptPrune
from bilevel_fast.erasing.edit import RECORD, Job, to_json
from bilevel_fast.erasing.pairs import Frame, Pair
from bilevel_fast.erasing.settings import Upper
from bilevel_fast.erasing.uce import Uce
from bilevel_fast.models.folder import ModelFolder, load_unet, save_student
from bilevel_fast.models.unet import UNet
from bilevel_fast.pruning import reinitialise
from bilevel_fast.runs.assemble import Materials, fit, levels
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.training.checkpoint import GracefulStop
from bilevel_fast.training.levels import descend
from bilevel_fast.training.loop import Interrupted, Places, running
from bilevel_fast.training.losses import LossWeights

_log = logging.getLogger(__name__)

LABELS = {
    "teacher": "dense teacher",
    "distilled": "distilled",
    "esd": "distilled + ESD",
    "uce": "distilled + UCE",
    "concept-prune": "distilled + ConceptPrune",
    "bilevel": "bilevel",
    "bilevel-uce": "bilevel, UCE inside",
    "sld": "distilled + SLD",
}
"""Rows of the tables; all but the last two are the paper's, in its order."""


Notes = Mapping[str, dict[str, Any]]
"""JSON files to lie in a model folder, by name."""


@dataclass(frozen=True)
class StudentRecipe:
    """How the rows of one table are made.

    Attributes:
        bilevel: The run of the last row; the others share with it what they can.
        esd: Upper level of ESD. Its number of steps is that of the bilevel run's.
        uce, concept_prune: The edits.
        pairs: What the edits erase, and what should stand in its place.
        frames: Sentences for them.
        names: What UCE erases by itself, without sentences; empty where it takes the pairs.
        preserve: Texts that UCE keeps.
    """

    bilevel: TrainConfig
    esd: Upper
    uce: Uce
    concept_prune: ConceptPrune
    pairs: tuple[Pair, ...]
    frames: tuple[Frame, ...]
    preserve: tuple[str, ...]
    names: tuple[Pair, ...] = ()


class Workshop:
    """Makes models of one seed, or finds them.

    Args:
        recipe: How.
        folder: The teacher's.
        pruned: The student that all start from.
        materials: What they are trained with.
        out: Where the folders go.
        stop: Asks to stop between steps; what is finished is kept.
    """

    def __init__(
        self,
        recipe: StudentRecipe,
        folder: ModelFolder,
        pruned: UNet,
        materials: Materials,
        out: Path,
        device: torch.device,
        stop: GracefulStop,
    ):
        self.recipe, self.folder, self.pruned, self.materials = recipe, folder, pruned, materials
        self.out, self.device, self.stop = out, device, stop

    def __call__(self, name: str) -> Path:
        """The model folder of a row.

        Raises:
            Interrupted: A stop was asked for.
            UserError: A step of it cannot be carried out.
        """
        if name == "teacher":
            return self.folder.path
        name = "distilled" if name == "sld" else name  # what differs is how it is sampled: the judge knows
        return self._keep(name, lambda: self._make(name))

    def after(self, name: str, steps: int, weights: LossWeights, random: bool) -> Path:
        """The folder of a student distilled on the way to somewhere, for a curve.

        Args:
            name: Of the curve.
            steps: Lower steps so far, 0 or more.
            weights: Of the lower losses.
            random: It has started from random weights in the pruned shape.

        Raises:
            Interrupted: A stop was asked for.
        """

        def make() -> tuple[UNet, Notes]:
            config = self.recipe.bilevel
            start = reinitialise(copy.deepcopy(self.pruned), config.seed) if random else self.pruned
            lower = replace(config.lower, steps=steps, weights=weights)
            alone = replace(config, lower=lower, upper=replace(config.upper, every=0))
            return (self._train(name, alone, start) if steps else start), {}

        return self._keep(f"{name}-{steps}", make)

    def _keep(self, name: str, make: Callable[[], tuple[UNet, Notes]]) -> Path:
        if not (path := self.out / name).exists():
            _log.info("seed %d: making %s", self.recipe.bilevel.seed, LABELS.get(name, name))
            unet, notes = make()
            save_student(path, self.folder, unet, notes=notes)
        return path

    def _make(self, name: str) -> tuple[UNet, Notes]:
        config = self.recipe.bilevel
        if name == "esd":
            return self._suppressed(), {}
        if name in ("uce", "concept-prune"):
            return self._edited(self.recipe.uce if name == "uce" else self.recipe.concept_prune)
        if name == "distilled":
            config = replace(config, upper=replace(config.upper, every=0))
        if name == "bilevel-uce":  # an edit reads nothing else
            config = replace(config, upper=Upper(config.upper.every, eraser="uce", anchor=config.upper.anchor))
        return self._train(name, config, self.pruned), {}

    def _train(self, name: str, config: TrainConfig, start: UNet) -> UNet:
        """A copy of `start` after the run of a configuration, from its last checkpoint if there is one."""
        student = copy.deepcopy(start).to(self.device)
        self.out.mkdir(parents=True, exist_ok=True)
        places = Places(self.out / "checkpoints" / name, self.out / f"stats-{name}.jsonl", self.out / "events" / name)
        fit(config, student, self.materials, places, self.stop, self.device)
        return student

    def _suppressed(self) -> UNet:
        """Two-stage: the distilled student, then upper steps alone, as many as the bilevel run takes."""
        config, student = self.recipe.bilevel, load_unet(self("distilled")).to(self.device)
        steps = config.lower.steps // config.upper.every
        lower, upper = levels(replace(config, upper=self.recipe.esd), student, self.materials, self.device)
        assert upper is not None, "a table of suppression has concepts"
        with running([lower, upper], self.device):
            for step in range(steps):
                descend(upper, step)
                if self.stop.requested:
                    raise Interrupted(f"stopped after step {step + 1} of {steps} of ESD, which starts anew")
            lower.optimizer.flat.release()
        return student

    def _edited(self, edit: Uce | ConceptPrune) -> tuple[UNet, Notes]:
        unet, recipe = load_unet(self("distilled")).to(self.device).requires_grad_(False), self.recipe
        job = Job(self.folder, recipe.pairs, recipe.frames)
        if isinstance(edit, Uce):
            job = replace(job, preserve=recipe.preserve)
            job = replace(job, pairs=recipe.names, frames=()) if recipe.names else job
        outcome = edit.edit(unet, job)
        return unet, {RECORD: to_json([outcome.record])}
