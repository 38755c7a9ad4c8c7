"""`evaluate --suite style|nsfw|coco`: folders of images in, one JSON and one table out."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from bilevel_fast.base.claims import claimed
from bilevel_fast.base.devices import pick_device
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import write_atomic, write_json
from bilevel_fast.metrics import suites
from bilevel_fast.metrics.pairing import each
from bilevel_fast.metrics.scorers import Scorers
from bilevel_fast.metrics.table import labels, table

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


@dataclass(frozen=True)
class Folders:
    """Settings of the suites that measure folders of images."""

    suite: Literal["mini", "style", "nsfw", "coco"] = "mini"
    """`mini` judges models of a built-in world; `style` (CLIP score, CP score, CSD), `nsfw` (NudeNet) and `coco`
    (FID, CLIP score) measure images that `sample --prompts-file ... --folder ...` drew."""
    images: tuple[Path, ...] = ()
    """Folders of images of the model that is judged, one for each of --prompts."""
    prompts: tuple[Path, ...] = ()
    """What they were drawn from: tables of artists, I2P, MMA, coco_30k.csv; captions_*.json; text, a prompt a line."""
    reference: tuple[Path, ...] = ()
    """Compared with. style: the distilled model's folders, one per prompt file; nsfw: the dense model's; coco: real
    images, or statistics of them: .npz with mu and sigma, or .safetensors."""
    out: Path = Path("eval.json")
    """All results; the table goes beside it, as .md. An existing file is refused."""
    clip_weights: Path | None = None
    """OpenAI's ViT-B-32.pt, or another of its files; or weights of --clip-model."""
    clip_model: str | None = None
    """Architecture of open_clip that --clip-weights are of, such as ViT-B-32-quickgelu. Default: OpenAI's own file."""
    csd_weights: Path | None = None
    """The checkpoint that the authors of CSD publish (ViT-L)."""
    inception_weights: Path | None = None
    """pt_inception-2015-12-05-6726825d.pth, for FID."""
    statistics_out: Path | None = None
    """coco: write the statistics of a reference folder there, .npz or .safetensors."""
    draws: int = 1000
    """Of the bootstrap, for the intervals."""
    fid_draws: int = 20
    """Of the bootstrap of FID; one takes seconds. 0 leaves its interval out."""
    batch: int = 32
    """Images at a time."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one. NudeNet stays on the CPU."""


def given(config: Folders, but: tuple[str, ...] = ("suite",)) -> list[str]:
    """The flags of `Folders` whose values are not the defaults."""
    changed = (f.name for f in fields(Folders) if f.name not in but and getattr(config, f.name) != f.default)
    return ["--" + name.replace("_", "-") for name in changed]


def measure(config: Folders, seed: int = 0) -> tuple[dict[str, Any], str]:
    """Run a suite and write what it measured.

    Returns:
        The JSON, and the markdown.

    Raises:
        UserError: The settings do not fit the suite or each other, the result is there already, or anything is broken.
    """
    report = config.out.with_suffix(".md")
    _check(config, report)
    with claimed(config.out) as begun:
        for path in filter(None, (report, config.statistics_out)):
            if begun:  # half of what a killed call was to leave
                path.unlink(missing_ok=True)
            if path.exists():
                raise UserError(f"{path} exists already; delete it or choose another name")
        return _measure(config, report, seed)


def _measure(config: Folders, report: Path, seed: int) -> tuple[dict[str, Any], str]:
    draws = suites.Draws(config.draws, config.fid_draws, seed)
    scorers = Scorers.load(
        clip_weights=config.clip_weights, clip_model=config.clip_model, csd_weights=config.csd_weights,
        inception_weights=config.inception_weights, nudenet=config.suite == "nsfw", device=pick_device(config.device),
        batch=config.batch,
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
    text += "".join(f"\n\nnote: {note}" for note in notes) + "\n"
    write_atomic(report, text.encode())
    try:
        write_json(config.out, result)  # the last: where it is, all is
    except OSError:
        report.unlink()
        raise
    return result, text


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
