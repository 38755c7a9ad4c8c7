"""`evaluate --suite style|nsfw|coco`: folders of images in, one JSON and one table out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from bilevel_fast.base.claims import claimed
from bilevel_fast.base.devices import pick_device
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import write_atomic, write_json
from bilevel_fast.metrics import suites
from bilevel_fast.metrics.images import Batching
from bilevel_fast.metrics.pairing import each
from bilevel_fast.metrics.scorers import Scorers
from bilevel_fast.metrics.settings import Folders, given
from bilevel_fast.metrics.table import labels, table
from bilevel_fast.scale.team import ALONE, Team

_UNREAD = {
    "style": ("--inception-weights", "--statistics-out", "--fid-draws"),
    "nsfw": (
        "--inception-weights",
        "--statistics-out",
        "--fid-draws",
        "--clip-weights",
        "--clip-model",
        "--csd-weights",
    ),
    "coco": ("--csd-weights",),
}


def measure(config: Folders, seed: int = 0, team: Team = ALONE) -> tuple[dict[str, Any], str]:
    """Run a suite and write what it measured; ranks of a team share the pictures, and the first of them writes.

    Returns:
        The JSON, and the markdown.

    Raises:
        UserError: The settings do not fit the suite or each other, the result is there already, or anything is broken.
    """
    report = config.out.with_suffix(".md")
    _check(config, report)
    if team.rank:
        return _measured(replace(config, statistics_out=None), seed, team)
    with claimed(config.out) as begun:
        for path in filter(None, (report, config.statistics_out)):
            if begun:  # half of what a killed call was to leave
                path.unlink(missing_ok=True)
            if path.exists():
                raise UserError(f"{path} exists already; delete it or choose another name")
        result, text = _measured(config, seed, team)
        write_atomic(report, text.encode())
        try:
            write_json(config.out, result)  # the last: where it is, all is
        except OSError:
            report.unlink()
            raise
        return result, text


def _measured(config: Folders, seed: int, team: Team) -> tuple[dict[str, Any], str]:
    draws = suites.Draws(config.draws, config.fid_draws, seed)
    scorers = Scorers.load(
        clip_weights=config.clip_weights, clip_model=config.clip_model, csd_weights=config.csd_weights,
        inception_weights=config.inception_weights, nudenet=config.suite == "nsfw", device=pick_device(config.device),
        batching=Batching(config.batch, team),
    )  # fmt: skip
    folders = config.images
    name = str(folders[0] if len(folders) == 1 else folders[0].parent)
    if config.suite == "style":
        result = suites.style(folders, config.reference or None, config.prompts, scorers, draws)
        text = table({name: {"style": result}})
    elif config.suite == "coco":
        reference, prompts = next(iter(config.reference), None), next(iter(config.prompts), None)
        result = suites.coco(folders[0], reference, prompts, scorers, draws, statistics_out=config.statistics_out)
        text = table({name: {"coco": result}})
    else:
        parts = each(config.images, config.prompts, config.reference)
        results = {prompts.stem: suites.nsfw(images, ref, prompts, scorers, draws) for images, prompts, ref in parts}
        result = {"suite": "nsfw", "results": results}
        text = table({stem: {"nsfw": found} for stem, found in results.items()})
        if config.reference:
            text += "\n\n" + labels(results)
    notes = [
        note for found in result.get("results", {"": result}).values() for s in found["sets"] for note in s["notes"]
    ]
    return result, text + "".join(f"\n\nnote: {note}" for note in notes) + "\n"


def _check(config: Folders, report: Path) -> None:
    if not config.images:
        raise UserError(f"--suite {config.suite} wants --images FOLDER")
    if config.suite == "coco":
        several = [f for f in ("images", "prompts", "reference") if len(getattr(config, f)) > 1]
        if several:
            raise UserError(f"--suite coco measures one folder; --{several[0]} has several")
    else:
        each(config.images, config.prompts, config.reference)
        stems = [path.stem for path in config.prompts]
        if config.suite == "nsfw" and len(set(stems)) < len(stems):
            raise UserError(f"two prompt files are named {next(s for s in stems if stems.count(s) > 1)!r}; rename one")
    idle = [flag for flag in given(config) if flag in _UNREAD[config.suite]]
    if idle:
        raise UserError(f"--suite {config.suite} does not read {idle[0]}")
    if config.clip_model and not config.clip_weights:
        raise UserError("--clip-model names an architecture; its weights are missing: give --clip-weights FILE")
    if config.statistics_out and not (config.reference and config.reference[0].is_dir() and config.inception_weights):
        raise UserError("--statistics-out wants --inception-weights and a --reference folder of images")
    if config.statistics_out and config.statistics_out.suffix not in (".npz", ".safetensors"):
        raise UserError(f"--statistics-out {config.statistics_out} must end in .npz or .safetensors")
    if config.draws < 100 or config.fid_draws < 0 or config.fid_draws == 1 or config.batch < 1:
        raise UserError("wanted --draws of at least 100, --fid-draws 0 or at least 2, --batch of at least 1")
    for path in (config.out, report, config.statistics_out):
        if path and not path.parent.is_dir():
            raise UserError(f"{path}: the folder {path.parent} does not exist")
