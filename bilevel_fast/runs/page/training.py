"""The report of a training run, `report.html` in its folder: made of the folder's files alone, at any time later.

page.training.report(Path("runs/mini"), text_length=12)
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from bilevel_fast.runs import repeat
from bilevel_fast.runs.page import document, macs, progress, quality
from bilevel_fast.runs.page.charts import number
from bilevel_fast.runs.page.document import Html, code, facts, image, note, scrolling, section, unit
from bilevel_fast.runs.page.parts import duration, environment, files, memory, settings
from bilevel_fast.runs.page.quality import percent
from bilevel_fast.runs.page.record import Record

_FILES = {
    "student/": "the student, a model folder",
    "distilled/": "the same without upper steps, a model folder",
    "summary.json": "the numbers of this page",
    "config.json": "every setting",
    "inputs.json": "fingerprints of what the settings name",
    "concepts.json": "what was erased, and its banks",
    "stats.jsonl": "what was logged while the student was trained",
    "stats-distilled.jsonl": "the same of the one without upper steps",
    "sessions.jsonl": "who worked on the run, and when",
    "samples/comparison.png": "all samples on one picture",
    "events/": "for TensorBoard",
    "checkpoints/": "what --resume goes on from",
}

_SAME = "On a CPU, the same commit, torch and machine end with the same bits. --out names a new folder."


def report(path: Path, text_length: int) -> str:
    """The page.

    Args:
        path: Folder of a finished run.
        text_length: Tokens that the model reads, to count MACs at.

    Raises:
        UserError: A file of the run is missing or broken; says which.
    """
    run = Record.of(path)
    found: Mapping[str, Mapping[str, float]] = run.summary.get("quality") or {}
    usual = f"the preset {repeat.preset_of(run.config)}"
    parts: list[Html] = [document.tiles(_tiles(run, found))]
    if run.samples:
        parts.append(section("Before and after", quality.samples(run.samples, run.erased)))
    elif run.sheet is not None:
        picture = image(run.sheet, f"Samples, one row for each of {', '.join(found)}, one column for each prompt")
        parts.append(section("Before and after", scrolling("Samples", picture)))
    if found:
        parts.append(section("Quality", *_quality(run, found)))
    parts.append(section("Losses", progress.losses(run.stats)))
    parts.append(section("MACs by site", _ratio(run), macs.by_site(run.structure, text_length)))
    parts.append(section("Speed and memory", facts(_costs(run)), progress.speed(run.stats)))
    parts.append(section("Settings", settings(run.config, repeat.changed(run.config), usual)))
    if run.sessions:
        parts.append(section("Environment", environment(run.sessions)))
    parts.append(section("Run it again", code(repeat.command(run.config)), note(_SAME)))
    parts.append(section("Files", files(path, _FILES), note("Links lead into the folder of the run.")))
    title = f"bilevel_fast: {run.config.get('preset', 'run')}, seed {run.config.get('seed', '?')}"
    return document.page(title, *parts, lead=_lead(run), footer=f"Made by bilevel_fast from the files in {path}.")


def _lead(run: Record) -> str:
    done = (
        f"{run.summary.get('lower_steps', 0):,} lower steps that distil, {run.summary.get('upper_steps', 0):,} upper "
        "steps that suppress"
    )
    return f"A pruned student: {done}" + (f" {_listed(run.erased)}." if run.erased else ".")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"“{name}”" for name in names)


def _tiles(run: Record, found: Mapping[str, Mapping[str, float]]) -> Iterable[tuple[str, str, object]]:
    size = run.summary.get("macs") or {}
    if size:
        about = f"{_gmacs(size['student_g'])} of {_gmacs(size['dense_g'])} GMAC per forward pass"
        yield "MACs kept", percent(size["ratio"]), about
    kept, dense = (_parameters(s) for s in (run.structure, Structure.dense(run.structure.config)))
    yield "Parameters kept", percent(kept / dense), f"{number(kept)} of {number(dense)}"
    teacher, student = found.get("teacher", {}), found.get("student", {})
    for metric in ("concept_hit", "other_style_hit", "fid"):
        if metric in student:
            name, better = quality.METRICS[metric]
            show = number if metric == "fid" else percent
            wanted = "lower" if better == "↓" else "higher"
            about = f"teacher {show(teacher[metric])}; {wanted} is better" if metric in teacher else ""
            yield name[0].upper() + name[1:], show(student[metric]), about
    if rate := run.summary.get("images_per_second"):
        yield "Speed", unit(number(rate), "images/s"), "lower images over the time of both levels"
    if seconds := sum(float(rows[-1].get("seconds", 0)) for rows in run.stats.values() if rows):
        both = f", {' and '.join(run.stats)} together" if len(run.stats) > 1 else ""
        yield "Time in steps", duration(seconds), f"without sampling and judging{both}"
    if peak := memory(run.sessions):
        yield "Peak memory", unit(peak[0], "GiB"), peak[1]


def _gmacs(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _parameters(structure: Structure) -> int:
    return count(structure, structure.config.sample_size, 1).params


def _quality(run: Record, found: Mapping[str, Mapping[str, float]]) -> Iterable[Html]:
    shares = run.shares()
    yield quality.quality(found, shares)
    each: Mapping[str, Mapping[str, float]] = run.summary.get("hits") or {}
    if any(len(row) > 1 for row in each.values()):
        yield quality.hits(each, shares.get("concept_hit"))


def _ratio(run: Record) -> Html:
    size = run.summary.get("macs") or {}
    dropped = len(run.structure.dropped)
    gone = f"; {dropped} sites are dropped" if dropped else ""
    return note(f"The student keeps {percent(size['ratio'])} of the teacher's MACs{gone}." if size else "")


def _costs(run: Record) -> Iterable[tuple[str, object]]:
    for name, rows in run.stats.items():
        if rows:
            yield f"{quality.MODELS.get(name, name)}, in steps", duration(float(rows[-1].get("seconds", 0)))
    if seconds := run.summary.get("seconds"):
        yield "last session", f"{duration(seconds)}, with banks, sampling and judging"
    if peak := memory(run.sessions):
        yield "peak memory", f"{peak[0]} GiB {peak[1]}"
    else:
        yield "peak memory", "not noted"
