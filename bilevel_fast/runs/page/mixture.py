"""The report of a router's training, `report.html` in its folder: made of the folder's files alone."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bilevel_fast.base.files import read_json, read_json_lines
from bilevel_fast.runs import repeat, sessions
from bilevel_fast.runs.page import document, progress
from bilevel_fast.runs.page.charts import bar, number
from bilevel_fast.runs.page.document import code, legend, note, section, table, unit
from bilevel_fast.runs.page.parts import duration, environment, files, memory, settings
from bilevel_fast.runs.page.quality import percent

_FILES = {
    "mixture.json": "the mixture",
    "experts/": "its experts, each a model folder",
    "router.safetensors": "what sends prompts to them",
    "summary.json": "the numbers of this page",
    "config.json": "every setting",
    "stats.jsonl": "what was logged",
    "sessions.jsonl": "who worked on the run, and when",
    "checkpoints/": "what --resume goes on from",
}


def report(path: Path, usual: Mapping[str, Any]) -> str:
    """The page.

    Args:
        path: Folder of a run whose experts are planned.
        usual: Settings that nobody has changed.

    Raises:
        UserError: A file of the run is missing or broken; says which.
    """
    config, summary = read_json(path / "config.json"), read_json(path / "summary.json")
    stats = {"router": [row for _, row in read_json_lines(path / "stats.jsonl")]}
    worked, experts = sessions.read(path), summary["experts"]
    tiles = [
        ("Budget", percent(summary["budget"]), "of the teacher's MACs, for each expert"),
        ("Experts", str(len(experts)), f"for {summary['prompts']:,} training prompts"),
        ("Time in steps", duration(float(stats["router"][-1]["seconds"]) if stats["router"] else 0.0), ""),
    ]
    if held := memory(worked):
        tiles.append(("Peak memory", unit(held[0], "GiB"), held[1]))
    most = max((row["prompts"] for row in experts), default=0) or 1
    lines = [
        [f"expert {row['expert']}", bar(row["macs"], row["macs"]), percent(row["macs"]), bar(row["prompts"] / most, 0),
         number(row["prompts"], 6), ", ".join(row["dropped"]) or "none"]
        for row in experts
    ]  # fmt: skip
    head = ["", "MACs, of the teacher's", "", f"prompts, of {most:,}", "", "dropped sites"]
    different = repeat.different(config, usual)
    out = ["--out", repeat.beside(config["out"])]
    command = shlex.join(["python", "-m", "bilevel_fast.prune", "aptp", *repeat.flags(different), *out])
    whole = table(head, lines, label="Experts", bars=[1, 3], text=[5], wide=True)
    names = legend([("MACs", "one block"), ("prompts that it gets", "block")])
    parts = (
        document.tiles(tiles),
        section("Experts", names, whole),
        section("Losses", progress.losses(stats)),
        section("Speed", progress.speed(stats)),
        section("Settings", settings(config, different, "the defaults")),
        section("Environment", environment(worked)),
        section("Run it again", code(command), note("--out names a new folder.")),
        section("Files", files(path, _FILES), note("Links lead into the folder of the run.")),
    )
    lead = "A router that sends each prompt to one of several pruned experts (APTP, arXiv:2406.12042)."
    foot = f"Made by bilevel_fast from the files in {path}."
    return document.page(f"bilevel_fast: router, seed {config['seed']}", *parts, lead=lead, footer=foot)
