"""The paper's evaluations of a folder of images: `style` (table 1), `nsfw` (figure 7, table 2), `coco` (both tables).

Every suite returns JSON values:

    {"suite", "sets": [{"images", "reference", "prompts", "count", "settings", "notes"}], "metrics": {NAME: ENTRY}, ...}

    and for a folder of `coco` to compare with, "reference_count": how many pictures it has

    ENTRY   {"value", "low", "high", "n", "interval"}, or {"value": None, "not_measured": what would supply it}

Source: arXiv:2412.15341, section 4.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.metrics import interval, nudenet
from bilevel_fast.metrics.clip_score import clip_scores
from bilevel_fast.metrics.cp_score import cp_scores
from bilevel_fast.metrics.csd import csd_scores
from bilevel_fast.metrics.fid import FEATURES, fid, load_statistics, save_statistics
from bilevel_fast.metrics.images import Pictures, open_rgb
from bilevel_fast.metrics.pairing import Pairs, each, pair
from bilevel_fast.metrics.prompt_sets import read_prompt_set
from bilevel_fast.metrics.scorers import Scorers

CLIP, CSD, INCEPTION = "--clip-weights FILE", "--csd-weights FILE", "--inception-weights FILE"
REFERENCE = "--reference FOLDER"

Paths = Path | Sequence[Path]
Result = dict[str, Any]


@dataclass(frozen=True)
class Draws:
    """Of the bootstrap: how many, and the seed of their random numbers."""

    images: int = 1000
    fid: int = 20
    """One takes seconds."""
    seed: int = 0


def style(images: Paths, reference: Paths | None, prompts: Paths, scorers: Scorers, draws: Draws = Draws()) -> Result:
    """CLIP score, CP score and CSD of images of artists' names, averaged over artists.

    Args:
        images: Folders of the model that is judged, one per prompt file.
        reference: Of the distilled model before erasure, same ids and seeds.
        prompts: Artists' files.

    Raises:
        UserError: What was given does not fit together, or an image is broken.
    """
    parts = _pairs(images, prompts, reference)
    groups = [group for part in parts for group in part.prompts.groups]
    files = [file for part in parts for file in part.images]
    references = [file for part in parts for file in part.references or []]
    no_clip, no_csd, no_reference = not scorers.clip and CLIP, not scorers.csd and CSD, not references and REFERENCE
    metrics = {"clip": _missing(no_clip), "cp": _missing(no_clip, no_reference), "csd": _missing(no_csd, no_reference)}
    by_artist: dict[str, dict[str, float]] = {}

    def measured(name: str, values: Any, share: bool = False) -> None:
        found = interval.mean(values, groups, share=share, draws=draws.images, seed=draws.seed)
        metrics[name] = found.entry()
        for group in dict.fromkeys(groups):
            mine = np.array([g == group for g in groups])
            by_artist.setdefault(group, {})[name] = float(values[mine].mean())

    if scorers.clip:
        texts = scorers.clip.texts([text for part in parts for text in part.prompts.texts])
        seen = scorers.clip.images(files)
        measured("clip", clip_scores(texts, seen))
        if references:
            measured("cp", cp_scores(texts, seen, scorers.clip.images(references)), share=True)
    if scorers.csd and references:
        measured("csd", csd_scores(scorers.csd.images(files), scorers.csd.images(references)))
    return _result("style", parts, images, reference, scorers, metrics) | {"by_artist": by_artist}


def nsfw(images: Path, reference: Path | None, prompts: Path, scorers: Scorers, draws: Draws = Draws()) -> Result:
    """Exposed parts that NudeNet sees: how many prompts stay clean, and what became of another model's.

    Args:
        images: Folder of the model that is judged.
        reference: Of another model, same ids and seeds: the dense one for the decrease (figure 7), the distilled one
            for what of its flagged images is cleared (table 2). Without it there is neither.
        prompts: I2P, MMA or Ring-A-Bell.

    Raises:
        UserError: What was given does not fit together, or an image is broken.
    """
    (part,) = _pairs(images, prompts, reference)
    names = ("resilience", "cleared", *(f"decrease/{label}" for label in ("all", *nudenet.LABELS)))
    if scorers.nudenet is None:
        metrics = {name: {"value": None, "not_measured": "load Scorers with nudenet=True"} for name in names}
        return _result("nsfw", [part], images, reference, scorers, metrics)
    counts = scorers.nudenet.counts(part.images)
    metrics = {name: _missing(REFERENCE) for name in names}
    metrics["resilience"] = nudenet.resilience(counts, draws=draws.images, seed=draws.seed).entry()
    details: Result = {
        "counts": _by_label(counts),
        "flagged": [name for name, row in zip(part.prompts.ids, counts, strict=True) if row.any()],
    }
    if part.references is not None:
        theirs = scorers.nudenet.counts(part.references)
        details["reference_counts"] = _by_label(theirs)
        less = nudenet.decrease(counts, theirs, draws=draws.images, seed=draws.seed)
        compared = {f"decrease/{label}": found for label, found in less.items()}
        compared["cleared"] = nudenet.cleared(counts, theirs, draws=draws.images, seed=draws.seed)
        none = {"value": None, "not_measured": "the reference has none"}
        metrics |= {name: found.entry() if found else none for name, found in compared.items()}
    return _result("nsfw", [part], images, reference, scorers, metrics) | details


def coco(
    images: Path,
    reference: Path | None,
    prompts: Path | None,
    scorers: Scorers,
    draws: Draws = Draws(),
    *,
    statistics_out: Path | None = None,
) -> Result:
    """FID against real images, and CLIP score with the captions.

    Args:
        images: Folder of the model that is judged.
        reference: Statistics (.npz, .safetensors), or a folder of real images, which are resized to the size of ours
            first, by PIL's bicubic filter, sides not kept in proportion.
        prompts: captions_*.json or coco_30k.csv; None for FID alone.
        statistics_out: Write the statistics of a reference folder there.

    Raises:
        UserError: What was given does not fit together, or an image is broken.
    """
    if reference and not reference.exists():
        raise UserError(f"reference {reference} does not exist; wanted a folder of images, or statistics")
    parts = _pairs(images, prompts, None) if prompts else []
    files = parts[0].images if parts else list(Pictures.open(images).files.values())
    metrics = {
        "fid": _missing(not scorers.inception and INCEPTION, not reference and REFERENCE),
        "clip": _missing(not scorers.clip and CLIP, not prompts and "--prompts FILE"),
    }
    if scorers.inception and reference:
        if reference.is_dir():
            theirs = scorers.inception.of_folder(reference, _side(files))
            if statistics_out:
                save_statistics(statistics_out, theirs, scorers.inception)
        else:
            theirs = load_statistics(reference, scorers.inception)
        metrics["fid"] = fid(files, theirs, scorers.inception, draws=draws.fid, seed=draws.seed).entry()
    if scorers.clip and parts:
        scores = clip_scores(scorers.clip.texts(parts[0].prompts.texts), scorers.clip.images(files))
        metrics["clip"] = interval.mean(scores, draws=draws.images, seed=draws.seed).entry()
    result = _result("coco", parts, images, reference, scorers, metrics)
    if not parts:
        ours = Pictures.open(images)
        result["sets"] = [_set(images, reference, None, len(files), ours.settings, ours.notes)]
    if reference and reference.is_dir():
        theirs = Pictures.open(reference)
        result["sets"][0]["reference_count"] = len(theirs.files)
        result["sets"][0]["notes"] += theirs.notes
    if metrics["fid"]["value"] is not None and len(files) <= FEATURES:
        result["sets"][0]["notes"].append(
            f"FID of {len(files)} images is too high: fewer than its {FEATURES} features; the paper's is of 5,000"
        )
    return result


def _pairs(images: Paths, prompts: Paths, reference: Paths | None) -> list[Pairs]:
    sets = each(_listed(images), _listed(prompts), _listed(reference))
    return [pair(folder, read_prompt_set(file), theirs) for folder, file, theirs in sets]


def _listed(paths: Paths | None) -> list[Path]:
    return [] if paths is None else [Path(paths)] if isinstance(paths, Path | str) else [Path(path) for path in paths]


def _missing(*flags: str | bool) -> dict[str, Any]:
    """An entry that says which of these flags would supply it; False is one that was given."""
    return {"value": None, "not_measured": "give " + " and ".join(flag for flag in flags if isinstance(flag, str))}


def _by_label(counts: Any) -> dict[str, int]:
    return dict(zip(nudenet.LABELS, counts.sum(0).tolist(), strict=True))


def _side(files: Sequence[Path]) -> int:
    """The side of square pictures, by the first of them."""
    width, height = open_rgb(files[0]).size
    if width != height:
        raise UserError(f"{files[0]} is {width} x {height}; FID against a folder wants square images: give statistics")
    return width


def _result(
    suite: str,
    parts: Sequence[Pairs],
    images: Paths,
    reference: Paths | None,
    scorers: Scorers,
    metrics: Mapping[str, Any],
) -> Result:
    references = _listed(reference)
    sets = [
        _set(
            folder,
            references[n] if references else None,
            part.prompts.name,
            len(part.images),
            part.settings,
            part.notes,
        )
        for n, (folder, part) in enumerate(zip(_listed(images) if parts else [], parts, strict=True))
    ]
    weights = {flag: {"file": file, "sha256": digest} for flag, file, digest in scorers.weights}
    return {"suite": suite, "sets": sets, "weights": weights, "torch": torch.__version__, "metrics": dict(metrics)}


def _set(
    images: Path, reference: Path | None, prompts: str | None, count: int, settings: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    return {
        "images": str(images),
        "reference": str(reference) if reference else None,
        "prompts": prompts,
        "count": count,
        "settings": dict(settings),
        "notes": list(notes),
    }
