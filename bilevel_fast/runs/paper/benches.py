"""Where the models of one seed and one set of concepts are made and measured: on a built-in world, and in full."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.erasing.concept_prune import FRAMES
from bilevel_fast.erasing.pairs import Frame, Pair
from bilevel_fast.models.folder import ModelFolder, load_folder
from bilevel_fast.runs.config import TrainConfig
from bilevel_fast.runs.paper.judges import Judge
from bilevel_fast.runs.paper.settings import Full, Rows
from bilevel_fast.runs.paper.students import StudentRecipe, Workshop
from bilevel_fast.runs.paper.world_judge import WorldJudge
from bilevel_fast.runs.session import gather, initial_student
from bilevel_fast.sampling.prompts import read_prompts
from bilevel_fast.training.checkpoint import GracefulStop
from bilevel_fast.worlds import drawn_world


@dataclass(frozen=True)
class Bench:
    """Of one seed and one set of concepts."""

    shop: Workshop
    judge: Judge


Benches = Callable[[int, Sequence[str]], Bench]
"""Of a seed and the concepts to erase."""


def world_benches(config: TrainConfig, rows: Rows, out: Path, device: torch.device, stop: GracefulStop) -> Benches:
    """Benches on a drawn world; concepts are names of styles.

    Raises:
        UserError: The teacher is no model of it.
    """
    here = drawn_world(config.world)
    folder = load_folder(config.teacher or here.TEACHER)
    if folder.family.world != here.name:
        raise UserError(f"{folder.path} is no model of the {here.name} world; --scale full is for others")

    def bench(seed: int, concepts: Sequence[str]) -> Bench:
        weights = weights_of(config, config.erase, concepts)
        own = replace(config, seed=seed, erase=tuple(concepts), concept_weights=weights)
        place = _place(out, seed, concepts)
        erased = here.erased_concepts(concepts)
        phrases = [here.phrase(style) for style in erased]
        recipe = _recipe(
            own,
            rows,
            phrases,
            list(map(Frame.of, here.subjects())),
            [scene.caption for scene in here.scenes if scene.style not in erased],
        )
        shop = _shop(recipe, folder, erased, place, device, stop)
        bank = shop.materials.concepts
        assert bank is not None
        judge = WorldJudge(
            here, folder, own, erased, bank, lambda: shop("distilled"), rows.attack, place / "samples", device,
            rows.sld.of(phrases),
        )  # fmt: skip
        return Bench(shop, judge)

    return bench


def full_benches(
    config: TrainConfig, rows: Rows, full: Full, out: Path, device: torch.device, stop: GracefulStop
) -> Benches:
    """Benches on a Stable Diffusion; concept number n is the n-th phrase and the n-th bank.

    Raises:
        UserError: A path is missing or wrong, or phrases and banks do not fit each other.
    """
    from bilevel_fast.metrics.scorers import Scorers  # its packages are optional
    from bilevel_fast.runs.paper.full_judge import FullJudge

    assert config.teacher is not None, "the command line was checked"
    if len(full.phrase) != len(config.concepts):
        raise UserError(
            f"{len(full.phrase)} --full.phrase came for {len(config.concepts)} --run.concepts; wanted one each"
        )
    for flag, path in full.paths():
        if not path.exists():
            raise UserError(f"{flag} {path} does not exist")
    folder = load_folder(config.teacher, device)
    preserve = read_prompts(full.preserve) if full.preserve else []
    scorers = Scorers.load(
        clip_weights=full.clip_weights,
        csd_weights=full.csd_weights,
        inception_weights=full.inception_weights,
        nudenet=any((full.mma, full.ring_a_bell, full.i2p)),
        device=str(device),
    )

    def bench(seed: int, concepts: Sequence[str]) -> Bench:
        own, place = replace(alone(config, full, concepts), seed=seed), _place(out, seed, concepts)
        recipe = _recipe(own, rows, concepts, FRAMES[full.subjects], preserve)
        recipe = replace(recipe, names=named(concepts, full.subjects))
        shop = _shop(recipe, folder, [], place, device, stop)
        samples, safe, given = place / "samples", rows.sld.of(concepts), replace(full, styles=styles_of(full, concepts))
        return Bench(shop, FullJudge(given, scorers, samples, lambda: shop("distilled"), seed, device, safe))

    return bench


def alone(config: TrainConfig, full: Full, concepts: Sequence[str]) -> TrainConfig:
    """A run that erases some of the phrases: with their banks, and their weights."""
    banks = tuple(config.concepts[full.phrase.index(name)] for name in concepts)
    return replace(config, concepts=banks, concept_weights=weights_of(config, full.phrase, concepts))


def weights_of(config: TrainConfig, all_concepts: Sequence[str], some: Sequence[str]) -> tuple[float, ...]:
    """The weights of some of a run's concepts; none where it has none."""
    weights = dict(zip(all_concepts, config.concept_weights, strict=False))
    return tuple(weights[name] for name in some) if weights else ()


def styles_of(full: Full, concepts: Sequence[str]) -> tuple[Path, ...]:
    """The prompt files in some styles: file number n is for phrase number n, if there are as many."""
    if len(full.styles) != len(full.phrase):
        return full.styles
    return tuple(full.styles[full.phrase.index(name)] for name in concepts)


def named(phrases: Sequence[str], subjects: str) -> tuple[Pair, ...]:
    """What UCE erases in the paper: the concepts' names alone, each taken for `art`, or for `person`.

    A name is a phrase without the `by` or `in the style of` that it begins with.
    """
    names = [phrase.removeprefix("by ").removeprefix("in the style of ") for phrase in map(str.strip, phrases)]
    return tuple(Pair(name, {"things": "art", "people": "person"}[subjects]) for name in names)


def _place(out: Path, seed: int, concepts: Sequence[str]) -> Path:
    return out / f"seed-{seed}" / "+".join(name.replace(" ", "-").replace("/", "-") for name in concepts)


def _recipe(
    config: TrainConfig, rows: Rows, phrases: Sequence[str], frames: Sequence[Frame], preserve: Sequence[str]
) -> StudentRecipe:
    pairs = tuple(map(Pair, phrases))
    esd = rows.esd.upper(config.upper)
    return StudentRecipe(config, esd, rows.uce, rows.concept_prune, pairs, tuple(frames), tuple(preserve))


def _shop(
    recipe: StudentRecipe, folder: ModelFolder, erased: list[int], place: Path, device: torch.device, stop: GracefulStop
) -> Workshop:
    teacher = folder.unet().requires_grad_(False)
    materials = gather(recipe.bilevel, folder, teacher, erased, place)
    pruned = initial_student(recipe.bilevel, folder, align=8 if device.type == "cuda" else 1)
    return Workshop(recipe, folder, pruned, materials, place, device, stop)
