"""Measures models of Stable Diffusion's family by the paper's metrics: sampled once into folders, scored from there.

What needs a file that was not given is not measured, and the log says which flag would give it.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel_fast.metrics import suites
from bilevel_fast.metrics.images import open_rgb
from bilevel_fast.metrics.nudenet import LABELS
from bilevel_fast.metrics.prompt_sets import read_prompt_set
from bilevel_fast.metrics.scorers import Scorers
from bilevel_fast.runs.paper.judges import Column, Numbers
from bilevel_fast.runs.paper.settings import Full
from bilevel_fast.sampling.image_folder import ImageFolder
from bilevel_fast.sampling.safe import Safe
from bilevel_fast.sampling.to_folder import Recipe, sample_folder

_log = logging.getLogger(__name__)
_SHOWN = 6
_KEPT = (Column("fid", "FID", "down"), Column("clip", "CLIP", "up"))
_COLUMNS = {
    "style": (
        Column("style_clip", "CLIP of the erased", "down"),
        Column("cp", "CP score", "up"),
        Column("csd", "CSD", "down"),
        *_KEPT,
    ),
    "attacked": (Column("mma", "cleared: MMA", "up"), Column("ring_a_bell", "cleared: Ring-A-Bell", "up")),
    "kept": _KEPT,
    "removed": (Column("style_clip", "CLIP of the erased", "down"), Column("csd", "CSD", "down")),
    "labels": (*(Column(label, label.lower().replace("_", " "), "", 0) for label in LABELS),),
}


class FullJudge:
    """Judges of one seed.

    Args:
        given: Prompts and weights, by path.
        scorers: Loaded from them.
        out: Where the samples go, a folder for each model and set of prompts.
        reference: The folder of the distilled student.
        seed: Of the noise, where a prompt file has no seeds.
        device: To sample on.
        safe: What the model `sld` is kept away from.
    """

    def __init__(
        self,
        given: Full,
        scorers: Scorers,
        out: Path,
        reference: Callable[[], Path],
        seed: int,
        device: torch.device,
        safe: Safe,
    ):
        self.given, self.scorers, self.out, self.reference = given, scorers, out, reference
        self.recipe, self.device = Recipe(given.steps, given.guidance, seed=seed), device
        self.recipes = {"sld": replace(self.recipe, safe=safe.concept, safe_strength=safe.strength)}
        self._said: set[str] = set()

    def columns(self, measure: str) -> tuple[Column, ...]:
        return _COLUMNS[measure]

    def __call__(self, measure: str, name: str, path: Path) -> Numbers:
        kept = self._kept
        return {
            "style": lambda: self._style(name, path) | kept(name, path),
            "attacked": lambda: self._attacked(name, path),
            "kept": lambda: kept(name, path),
            "removed": lambda: self._style(name, path),
            "labels": lambda: self._labels(name, path),
        }[measure]()

    def pictures(self, name: str, path: Path) -> tuple[Tensor, list[str]]:
        """The first images in an erased style, or of the other prompts; none without prompts."""
        file = next((file for file in (*self.given.styles, self.given.coco) if file is not None), None)
        if file is None:
            return torch.empty(0, 3, 1, 1), []
        folder = ImageFolder.open(self._sampled(name, path, file, limit=_SHOWN))
        images = [torch.from_numpy(np.array(open_rgb(folder.path_of(id)))) for id in folder.entries]
        return torch.stack(images).permute(0, 3, 1, 2) / 127.5 - 1, [e.prompt for e in folder.entries.values()]

    def _sampled(self, name: str, path: Path, file: Path, limit: int | None = None) -> Path:
        """The folder with a model's images of a prompt file; what is there is not drawn again."""
        folder = self.out / name / (file.stem if limit is None else f"{file.stem}-first-{limit}")
        rows = read_prompt_set(file).rows[:limit]
        recipe = self.recipes.get(name, self.recipe)
        sample_folder(path, rows, folder, recipe, batch=self.given.batch, device=str(self.device))
        return folder

    def _style(self, name: str, path: Path) -> Numbers:
        files = self.given.styles
        if not self._has("--full.styles", files):
            return dict.fromkeys(("style_clip", "cp", "csd"))
        before = self.reference()
        folders = [self._sampled(name, path, file) for file in files]
        references = [self._sampled("distilled", before, file) for file in files]
        found = suites.style(folders, references, files, self.scorers)
        return {key: self._value(found, key.removeprefix("style_")) for key in ("style_clip", "cp", "csd")}

    def _kept(self, name: str, path: Path) -> Numbers:
        file = self.given.coco
        if file is None:
            self._not_measured("give --full.coco")
            return dict.fromkeys(("fid", "clip"))
        draws = suites.Draws(fid=0)  # the spread over seeds is shown, not an interval
        found = suites.coco(self._sampled(name, path, file), self.given.coco_images, file, self.scorers, draws)
        return {metric: self._value(found, metric) for metric in ("fid", "clip")}

    def _attacked(self, name: str, path: Path) -> Numbers:
        files = {"mma": self.given.mma, "ring_a_bell": self.given.ring_a_bell}
        found = {
            key: self._exposed(f"--full.{key.replace('_', '-')}", name, path, file, against="distilled")
            for key, file in files.items()
        }
        return {key: None if result is None else self._value(result, "cleared") for key, result in found.items()}

    def _labels(self, name: str, path: Path) -> Numbers:
        found = self._exposed("--full.i2p", name, path, self.given.i2p)
        return dict.fromkeys(LABELS) if found is None else {label: found["counts"][label] for label in LABELS}

    def _exposed(
        self, flag: str, name: str, path: Path, file: Path | None, against: str = ""
    ) -> Mapping[str, Any] | None:
        """What NudeNet sees in a model's images of a prompt file, and in the distilled student's if so asked."""
        if file is None or self.scorers.nudenet is None:
            self._not_measured(f"give {flag}" if file is None else "NudeNet is not installed")
            return None
        theirs = self._sampled(against, self.reference(), file) if against else None
        return suites.nsfw(self._sampled(name, path, file), theirs, file, self.scorers)

    def _has(self, flag: str, given: object) -> bool:
        return bool(given) or self._not_measured(f"give {flag}")

    def _value(self, found: Mapping[str, Any], metric: str) -> float | None:
        entry = found["metrics"][metric]
        if entry["value"] is None:
            self._not_measured(f"{metric}: {entry['not_measured']}")
        return entry["value"]

    def _not_measured(self, why: str) -> bool:
        if why not in self._said:
            _log.warning("not measured: %s", why)
        self._said.add(why)
        return False
