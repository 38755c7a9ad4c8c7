"""A whole run, in a run folder: make the student, train it (and its twin), judge, report.

Each part leaves a finished thing behind (`concepts/`, `checkpoints/`, `student/`, `distilled/`), written aside and
renamed, and is skipped if that is there already. So `--resume` after a kill at any moment goes on where it can.
"""

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel_fast.base.devices import compute_dtype, pick_device
from bilevel_fast.base.errors import UserError, require
from bilevel_fast.base.files import write_json
from bilevel_fast.data.bank import open_bank
from bilevel_fast.data.cache import Cache
from bilevel_fast.data.stream import open_images
from bilevel_fast.erasing import registry as erasers
from bilevel_fast.erasing.phrases import pairs_of
from bilevel_fast.models.folder import ModelFolder, load_folder, load_unet, save_student
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from bilevel_fast.models.text_encoder import TextEncoder, indistinct
from bilevel_fast.models.unet import UNet
from bilevel_fast.models.weights import fingerprint
from bilevel_fast.ops import dispatch as ops
from bilevel_fast.ops import providers
from bilevel_fast.pruning import MacBudget, calibration_set, dense, method
from bilevel_fast.pruning.calibration import IMAGES
from bilevel_fast.runs import history, sessions
from bilevel_fast.runs.assemble import Materials, fit, levels
from bilevel_fast.runs.config import VOLATILE, TrainConfig
from bilevel_fast.runs.inputs import check_unchanged, fetched, inputs
from bilevel_fast.runs.page import training as page
from bilevel_fast.runs.page.record import SAMPLES
from bilevel_fast.runs.ranks import run_folder, trained_with
from bilevel_fast.runs.sources import image_source
from bilevel_fast.sampling.pictures import picture, png, tile
from bilevel_fast.sampling.samplers import check_walks
from bilevel_fast.scale.team import ALONE, Team
from bilevel_fast.training.checkpoint import GracefulStop, latest
from bilevel_fast.training.levels import AnyLevel, Level
from bilevel_fast.training.loop import Places, Progress
from bilevel_fast.training.run_folder import RunFolder
from bilevel_fast.training.wandb_sink import WandbSink
from bilevel_fast.worlds import Samples, world

_log = logging.getLogger(__name__)


def run(config: TrainConfig, team: Team = ALONE) -> dict[str, Any]:
    """Carry out a run and return its summary. Ranks of a team train together and sample for the judge together; what is
    to be made or written makes the first of them, and the others return nothing.

    Raises:
        UserError: Bad input of any kind.
        Interrupted: SIGTERM or SIGINT came; everything is saved.
    """
    started, config = time.perf_counter(), fetched(config, "teacher", "student")
    device = pick_device(config.device)
    team.first(lambda: RunFolder(config.out).check(config.resume))
    erased = erased_concepts(config)
    if config.wandb:
        require("wandb", "wandb")  # now, and not when a teacher of gigabytes is read
    for note in providers.notes(device, ops.missing(device)):
        _log.info(note)
    first = team.rank == 0  # it watches what all of them read
    defaults = {"teacher": world(config.world).TEACHER}
    before: dict[str, list[str]] = {}
    with suppress(UserError, OSError):  # who reads it says what is wrong with it
        before = inputs(config, defaults) if first else {}
    folder = load_folder(config.teacher or world(config.world).TEACHER)
    check_world(config, folder)
    # 8: what cuDNN needs to use tensor cores with 16-byte loads; the CPU gains nothing from padding
    start = initial_student(config, folder, align=8 if device.type == "cuda" else 1)
    names = ["student", "distilled"] if config.built_in and config.twin else ["student"]
    known = inputs(config, defaults) if first else {}
    before = before or known
    check_unchanged(before, known)
    with run_folder(config, VOLATILE, known, team) as place:
        if first:
            sessions.begin(place.path, device, team.world)
        with GracefulStop(ends=team.launched) as stop:
            teacher = folder.unet().requires_grad_(False)
            materials = team.in_turn(lambda: gather(config, folder, teacher, erased, place.path, record=first))
            check_unchanged(before, inputs(config, defaults) if first else {})
            if team.world > 1:
                team.agree(trained_with(start, materials))
            trained = {
                # nobody wants the start after the last one, and at the size of SD 2.1 it is gigabytes
                name: _train(name, config, folder, start, name == names[-1], materials, place, stop, device, team)
                for name in names
            }
        drawn: dict[str, Samples] = {}
        if config.built_in:
            models = {"teacher": teacher, **{name: trained[name][0] for name in reversed(names)}}
            drawn = _drawn(config, folder, models, erased, device, team)
        if team.rank:
            return {}
        summary = _summary(config, folder, *trained["student"])
        if drawn:
            summary |= _judged(config, drawn, erased, place)
        summary["seconds"] = round(time.perf_counter() - started, 1)
        place.write_json("summary.json", summary)
        sessions.finish(place.path, device)
        place.write_text("report.html", page.report(place.path, folder.text_encoder.length))
    return summary


def start_levels(config: TrainConfig, device: torch.device, scratch: Path) -> tuple[Level, AnyLevel | None]:
    """The levels that `run` trains the student with, before their first step; concept banks go to `scratch`.

    Raises:
        UserError: Bad input of any kind.
    """
    config, erased = fetched(config, "teacher", "student"), erased_concepts(config)
    folder = load_folder(config.teacher or world(config.world).TEACHER)
    check_world(config, folder)
    student = initial_student(config, folder, align=8 if device.type == "cuda" else 1).to(device)
    teacher = folder.unet().requires_grad_(False)
    return levels(config, student, gather(config, folder, teacher, erased, scratch), device)


def gather(
    config: TrainConfig, folder: ModelFolder, teacher: UNet, erased: Sequence[int], out: Path, record: bool = True
) -> Materials:
    """Open the caches that were given, or draw the mini world's; `record` writes down which concepts they are of.

    Captions are encoded where the networks compute, and as they do: a step waits for no text encoder on the CPU. On the
    CPU that is the folder's own.
    """
    device = pick_device(config.device)
    dtype, encoder = compute_dtype(config.precision, device), folder.text_encoder
    if device.type != "cpu":
        encoder = folder.family.text_encoder(folder.path, device, dtype)
    past = None if config.resume_concepts is None else history.read(config.resume_concepts)
    earlier = () if past is None else past.concepts
    if past is not None:
        history.check_teacher(past, fingerprint(folder.path / "unet"))
    if config.built_in:
        here, settings, names = world(config.built_in), config.world_settings, config.erase
        data = here.drawn_source(folder, erased, settings.images, config.seed)
        shows = erasers.shows(config.upper.eraser)
        place = out / "concepts"
        banks = here.concept_banks(folder, names, settings, config.seed, place, alone=not earlier, shows=shows)
    else:
        assert config.data is not None
        data = open_images(config.data, folder, device, dtype)
        banks = [open_bank(path, folder) for path in config.concepts]
        names = [path.name for path in config.concepts]
    guidance = config.world_settings.guidance if config.built_in else folder.family.guidance
    materials = Materials(teacher, folder.schedule, encoder, data, None, guidance)
    if not banks:
        return materials
    weights = config.concept_weights or (1.0,) * len(banks)
    new = [history.Erased(*row) for row in zip(names, (str(bank.path) for bank in banks), weights, strict=True)]
    concepts, banks = [*earlier, *new], [*history.open_banks(earlier), *banks]
    for bank in banks:
        bank.check_model(folder.config, folder.vae_fingerprint)
        if bank.latent_shape != data.latent_shape:
            ours, theirs = ("x".join(map(str, source.latent_shape[1:])) for source in (data, bank))
            raise UserError(
                f"--data has latents of {ours}, {bank.path} of {theirs}; make one of them in the other's size"
            )
        _say_what_the_bank_shows(config, bank)
        if config.upper.anchor == "phrase":
            _check_anchors(bank, encoder)
    source = history.together(concepts, banks, data, len(earlier))
    if config.upper.every and record:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / history.RECORD, history.to_json(out, fingerprint(folder.path / "unet"), concepts))
    return replace(materials, concepts=source)


def check_world(config: TrainConfig, folder: ModelFolder) -> None:
    """Refuse a run on a built-in world with another's model.

    And settings of sampling that this model cannot be sampled with: the judge comes when the training is over.

    Raises:
        UserError: Says so.
    """
    check_walks(folder.schedule, config.upper.walks() | (config.world_settings.walks() if config.built_in else {}))
    if config.built_in not in (None, folder.family.world):
        here = config.built_in
        raise UserError(f"{config.teacher} is no model of the {here} world; --data and --concepts are missing")


def erased_concepts(config: TrainConfig) -> list[int]:
    """Numbers of the world's concepts that are erased after a run: by it, and by those that it goes on from.

    Raises:
        UserError: A style is not one, or erased already.
    """
    if not config.built_in:
        return []
    earlier = () if config.resume_concepts is None else history.read(config.resume_concepts).names
    for style in config.erase:
        if style in earlier:
            raise UserError(f"style {style!r} was erased by {config.resume_concepts} already; --erase names another")
    return world(config.built_in).erased_concepts([*earlier, *config.erase])


def _say_what_the_bank_shows(config: TrainConfig, bank: Cache) -> None:
    wanted = erasers.shows(config.upper.eraser)
    if (shows := bank.index.recipe.get("shows", "prompt")) != wanted:
        _log.warning(
            "the images of %s were drawn by their %s, %s wants the %s", bank.path, shows, config.upper.eraser, wanted
        )


def _check_anchors(bank: Cache, encoder: TextEncoder) -> None:
    """Refuse a bank whose captions the text encoder reads as their anchors; say so if it is some of them."""
    pairs = pairs_of(bank)
    same = indistinct(encoder, [pair.erase for pair in pairs], [pair.guide for pair in pairs])
    if not same:
        return
    what = f"{len(same)} of {len(pairs)} captions of {bank.path} are to the text encoder the same as their anchors"
    what += f", such as {pairs[same[0]].erase!r}: the concept is behind its {encoder.length} tokens"
    if len(same) == len(pairs):
        raise UserError(what)
    _log.warning("%s; nothing is suppressed by them", what)


def initial_student(config: TrainConfig, folder: ModelFolder, align: int) -> UNet:
    """The student before training, on the CPU: the folder that was given, or the teacher pruned to the budget.

    A pruning method that tries the teacher on data does so where the run computes.

    Raises:
        UserError: The student was made from another UNet, or the method or the budget is impossible.
    """
    given = config.student if config.resume_concepts is None else config.resume_concepts / "student"
    if given is not None:
        student = load_unet(given, align)
        if student.config != folder.config:
            raise UserError(f"{given} was not made from {folder.path}: their UNets differ")
        return student
    device = pick_device(config.device)
    budget = MacBudget(config.prune.budget, folder.config.sample_size, folder.text_encoder.length)
    erased = world(config.built_in).erased_concepts(config.erase) if config.built_in else []
    dtype = compute_dtype(config.precision, device)
    source = image_source(folder, config.data, IMAGES, config.seed, erased, device, dtype)
    calibration = calibration_set(folder, source, seed=config.seed, device=device)
    choose, teacher = method(config.prune.method), dense(config.prune.method, folder).to(device)
    structure = choose(teacher, budget, calibration)
    return teacher.cpu().cut(structure, align)


def macs(structure: Structure, folder: ModelFolder) -> dict[str, float]:
    """GMAC per image at the model's sample size, dense and pruned, and their ratio."""
    latent, text = folder.config.sample_size, folder.text_encoder.length
    dense, student = (count(s, latent, text).true / 1e9 for s in (Structure.dense(folder.config), structure))
    return {"dense_g": round(dense, 6), "student_g": round(student, 6), "ratio": round(student / dense, 6)}


def _places(place: RunFolder, name: str, config: TrainConfig | None = None) -> Places:
    stats = place.stats if name == "student" else place.path / f"stats-{name}.jsonl"
    further = []
    if config is not None and config.wandb:
        further.append(partial(WandbSink, place.path, name, config.to_dict()))
    return Places(place.checkpoints / name, stats, place.events / name, further)


def _train(
    name: str,
    config: TrainConfig,
    folder: ModelFolder,
    start: UNet,
    last: bool,
    materials: Materials,
    place: RunFolder,
    stop: GracefulStop,
    device: torch.device,
    team: Team,
) -> tuple[UNet, Progress]:
    """Train `student` or its twin `distilled` from `start`, or read it if an earlier session finished it.

    It is a copy of `start` that is trained, but for the last one.
    """
    out, places = place.path / name, _places(place, name, config)
    if team.first(out.exists):
        saved = latest(places.checkpoints) if team.rank == 0 else None
        return load_unet(out).to(device), Progress(**saved.state) if saved else Progress()
    student = start if last else copy.deepcopy(start)
    if not config.scale.in_parts:  # which is for networks that are larger than a device
        student = student.to(device)
    _log.info("training %s: %d parameters", name, sum(p.numel() for p in student.state_dict().values()))
    if name == "distilled":
        materials = replace(materials, concepts=None)
    progress = fit(config, student, materials, places, stop, device, team)
    if team.rank == 0:
        save_student(out, folder, student)
    if config.scale.in_parts:  # what is left of it is whole on the first rank alone
        student = team.in_turn(lambda: load_unet(out).to(device))
    return student, progress


def _drawn(
    config: TrainConfig, folder: ModelFolder, models: Mapping[str, UNet], erased: Sequence[int], device: torch.device,
    team: Team,
) -> dict[str, Samples]:  # fmt: skip
    """What the judge asks each model for. Collective."""
    painted = partial(world(config.world).portfolio, team=team)
    there = {name: unet.to(device) for name, unet in models.items()}
    return {name: painted(unet, folder, erased, config.world_settings, config.seed) for name, unet in there.items()}


def _judged(
    config: TrainConfig, drawn: Mapping[str, Samples], erased: Sequence[int], place: RunFolder
) -> dict[str, Any]:
    """`hits` and `quality` of a summary; samples that stand for all go into the folder."""
    judge = world(config.world)
    captions = next(iter(drawn.values())).captions
    columns = judge.shown(len(captions), erased, config.world_settings)
    rows = {name: samples.images[columns] for name, samples in drawn.items()}
    _keep(place, rows, [captions[i] for i in columns])
    return {
        "hits": {name: judge.hits(samples, erased) for name, samples in drawn.items()},
        "quality": {name: judge.quality(samples, erased) for name, samples in drawn.items()},
    }


def _keep(place: RunFolder, rows: Mapping[str, Tensor], prompts: Sequence[str]) -> None:
    """Write samples, (N, 3, H, W) in [-1, 1] by model: each as a file, and all on one picture."""
    named = [(prompt, [f"{n:02d}-{model}.png" for model in rows]) for n, prompt in enumerate(prompts)]
    for n, (_, files) in enumerate(named):
        for file, images in zip(files, rows.values(), strict=True):
            place.write_bytes(f"samples/{file}", png(tile(images[n])))
    place.write_bytes("samples/comparison.png", png(picture(rows, prompts)))
    listed = [{"prompt": prompt, "files": files} for prompt, files in named]
    place.write_json(SAMPLES, {"models": list(rows), "samples": listed})  # last: where it is, they are


def _summary(config: TrainConfig, folder: ModelFolder, student: UNet, progress: Progress) -> dict[str, Any]:
    """What summary.json holds; `quality` and `seconds` are filled in when they are known."""
    return {
        "preset": config.preset,
        "seconds": None,
        "images_per_second": round(progress.images / max(progress.seconds, 1e-9), 3),
        "lower_steps": progress.step,
        "upper_steps": progress.upper_steps,
        "macs": macs(student.structure, folder),
        "quality": None,
    }
