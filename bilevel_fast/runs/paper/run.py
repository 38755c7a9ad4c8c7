"""Experiments, seed by seed and model by model, in one folder that they share.

    config.json                   settings, the same for all experiments in the folder
    seed-0/pointillism/...        a concept bank, models (model folders), checkpoints; experiments share them
    table1/rows.jsonl             a line per model, its concepts, seed and step, as soon as it is measured
    table1/results.json table.md  those of the concepts last asked for, and mean and spread over seeds
    table1/plot.png grid.png      the same drawn; samples of the first seed's models
    table1/report.html            all of it on one page

A row that is there is not measured again, a model that is there is not made again: whoever is killed goes on.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bilevel_fast.base.devices import machine, pick_device
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import append, read_file, read_json_lines, write_atomic
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.family import family_of
from bilevel_fast.runs.config import VOLATILE, TrainConfig, preset
from bilevel_fast.runs.inputs import fetched, inputs
from bilevel_fast.runs.page import experiment as page
from bilevel_fast.runs.paper import report
from bilevel_fast.runs.paper.again import reproduction
from bilevel_fast.runs.paper.benches import Bench, Benches, full_benches, world_benches
from bilevel_fast.runs.paper.experiments import EXPERIMENTS, Experiment, TableRow
from bilevel_fast.runs.paper.judges import Column
from bilevel_fast.runs.paper.settings import Full, Rows
from bilevel_fast.sampling.pictures import picture, png
from bilevel_fast.sampling.samplers import Method, check_walks
from bilevel_fast.training.checkpoint import GracefulStop
from bilevel_fast.training.run_folder import RunFolder
from bilevel_fast.worlds import world

_log = logging.getLogger(__name__)
ROWS = "rows.jsonl"
Measured = dict[str, Any]


def reproduce(
    name: str, config: TrainConfig, settings: Rows, full: Full | None, seeds: Sequence[int], out: Path
) -> tuple[str, Path]:
    """Carry out an experiment, or what is missing of it; returns its table, and the folder with its results.

    Args:
        name: Of `EXPERIMENTS`.
        config: Of the bilevel run.
        settings: Of the other rows.
        full: Prompts and weights of a Stable Diffusion; None is the mini world.
        seeds: One after the other.
        out: A new folder, or one of experiments with the same settings; seeds and concepts may be others.

    Raises:
        Interrupted: A stop was asked for; what is measured is kept.
        UserError: The folder holds something else, or a model cannot be made or measured.
    """
    config = fetched(config, "teacher", "student")
    walks: dict[str, tuple[int, Method]] = {
        "--rows.esd.sample.steps": (settings.esd.sample.steps, "ddim"),
        "--rows.concept-prune.steps": (settings.concept_prune.steps, "ddim"),
        **config.upper.walks(),
        **({"--full.steps": (full.steps, "pndm")} if full else config.world_settings.walks()),
    }
    default = world(config.world).TEACHER
    teacher = config.teacher or default
    family_of(teacher)  # what is no model is named as what it is, before a file of it is missed
    check_walks(Schedule.load(teacher), walks)
    if any(row.member == "sld" for row in EXPERIMENTS[name].rows):
        steps = full.steps if full else config.world_settings.judge_steps
        settings.sld.of(["a concept"]).check(steps, "--rows.sld.strength")
    asked = {"run": config.to_dict(), "rows": asdict(settings)} | ({"full": asdict(full)} if full else {})
    usual = {"run": preset(config.preset).to_dict(), "rows": asdict(Rows()), "full": asdict(Full())}
    volatile = tuple(f"run.{field}" for field in (*VOLATILE, "seed", "erase"))
    there, device = (out / "config.json").exists(), pick_device(config.device)
    same, unset = (json.loads(json.dumps(each, default=str)) for each in (asked, usual))
    settings_of = {"run": config} | ({"full": full} if full else {})
    known = inputs(settings_of, {"run.teacher": default}, but=("run.out",))
    opening = RunFolder.open(out, same, resume=there, volatile=volatile, inputs=known, unset=unset)
    with opening as place, GracefulStop() as stop:
        if full is None:
            concepts, benches = config.erase, world_benches(config, settings, place.path, device, stop)
        else:
            concepts, benches = full.phrase, full_benches(config, settings, full, place.path, device, stop)
        results = RunFolder(place.path / name)
        results.path.mkdir(exist_ok=True)
        again = partial(reproduction, name, same, out=out)
        return _run(EXPERIMENTS[name], config, concepts, seeds, benches, results, again), results.path


def _run(
    experiment: Experiment,
    config: TrainConfig,
    concepts: Sequence[str],
    seeds: Sequence[int],
    benches: Benches,
    place: RunFolder,
    again: Callable[[Sequence[int]], str],
) -> str:
    """`again` is the command that carries the experiment out once more, on some seeds."""
    models = experiment.models(concepts)
    wanted = [(row.name, list(erase)) for row, erase in models]
    rows = [row for row in read(place.path / ROWS) if (row["row"], row["concepts"]) in wanted]
    columns: tuple[Column, ...] = ()
    done = {(row["row"], tuple(row["concepts"]), row["seed"], row["step"]) for row in rows}
    shown: dict[str, Any] = {}
    for seed in seeds:
        made: dict[tuple[str, ...], Bench] = {}
        for row, erase in models:
            steps = dict.fromkeys(round(share * config.lower.steps) for share in (*row.steps, 1.0))
            missing = [step for step in steps if (row.name, erase, seed, step) not in done]
            if not missing and columns and (seed != seeds[0] or experiment.is_curve):
                continue
            if erase not in made:
                if experiment.apart:
                    made.clear()  # the models of another concept are done
                made[erase] = benches(seed, erase)
            bench = made[erase]
            columns = bench.judge.columns(experiment.measure)
            for step in missing:
                rows.append(_measure(experiment, row, erase, seed, step, bench))
                append(place.path / ROWS, (json.dumps(rows[-1], allow_nan=False) + "\n").encode())
                _log.info("seed %d, %s, step %d: %s", seed, row.label, step, rows[-1]["numbers"])
            one_set = erase == models[-1][1]  # of prompts, for all that are shown
            if seed == seeds[0] and not experiment.is_curve and one_set:
                shown[row.name], prompts = bench.judge.pictures(row.member, bench.shop(row.member))
                shown.setdefault("", prompts)
    return _write(experiment, config, columns, rows, shown, place, again(sorted({row["seed"] for row in rows})))


def read(path: Path) -> list[Measured]:
    """Rows measured so far; a last line that a kill cut short is taken out of the file."""
    if not path.exists():
        return []
    whole, newline, torn = read_file(path).rpartition(b"\n")
    if torn:
        _log.warning("%s: its last line was cut short, that row is measured again", path)
        write_atomic(path, whole + newline)
    found = [row for _, row in read_json_lines(path)]
    for number, row in enumerate(found, start=1):
        if missing := [name for name in ("row", "label", "concepts", "seed", "step", "numbers") if name not in row]:
            raise UserError(f"{path} line {number} has no {missing[0]!r}; delete the file to measure anew")
    return found


def _measure(
    experiment: Experiment, row: TableRow, concepts: Sequence[str], seed: int, step: int, bench: Bench
) -> Measured:
    name, shop = f"{row.name}-{step}" if row.steps else row.member, bench.shop
    if row.steps:
        path = shop.after(row.name, step, row.weights or shop.recipe.bilevel.lower.weights, row.random)
    else:
        path = shop(row.member)
    return {
        "row": row.name,
        "label": row.label,
        "concepts": list(concepts),
        "seed": seed,
        "step": step,
        "numbers": bench.judge(experiment.measure, name, path),
        **machine(shop.device),
    }


def _write(
    experiment: Experiment,
    config: TrainConfig,
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    shown: Mapping[str, Any],
    place: RunFolder,
    command: str,
) -> str:
    text = report.table(experiment, columns, rows)
    about = {"title": experiment.title, "columns": [asdict(column) for column in columns], "config": config.to_dict()}
    place.write_json("results.json", {**about, "rows": list(rows)})
    where = sorted({f"{row['device']}, torch {row['torch']}" for row in rows})
    place.write_text("table.md", f"# {experiment.title}\n\n{text}\n\nMeasured on {'; '.join(where)}.\n")
    report.plot(experiment, columns, rows, place.path / "plot.png")
    grid: bytes | None = None
    if models := {label: images for label, images in shown.items() if label and len(images)}:
        zoom = max(1, 96 // next(iter(models.values())).shape[-1])
        grid = png(picture(models, shown[""], zoom))
        place.write_bytes("grid.png", grid)
    place.write_text("report.html", page.report(experiment, columns, rows, grid, shown.get("", []), command))
    return text
