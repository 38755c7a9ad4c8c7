"""Parts of a page that the reports of all kinds of runs have: settings, sessions, files, memory, a span of time."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bilevel_fast.runs.page.charts import number
from bilevel_fast.runs.page.document import Html, details, facts, join, note, table, tag
from bilevel_fast.training.run_folder import flatten


def duration(seconds: float) -> str:
    """`12.3 s`, `3 min 20 s`, `5 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    if hours < 1:
        return f"{int(minutes)} min {int(seconds) % 60:02d} s"
    return f"{int(hours)} h {int(minutes) % 60:02d} min"


def settings(config: Mapping[str, Any], different: Mapping[str, tuple[Any, Any]], usual: str) -> Html:
    """What differs from the usual settings, and all of them, folded away.

    Args:
        config: What `config.json` holds.
        different: By dotted name, the run's setting and the usual one.
        usual: What the usual ones are called.
    """
    parts: list[Html] = [note(f"Those of {usual}, without a change.")]
    if different:
        lines = [[key, _shown(value), _shown(other)] for key, (value, other) in different.items()]
        head = ["setting", "this run", usual]
        parts = [table(head, lines, label="Settings that differ from the usual ones", text=[1, 2], wide=True)]
    every = [[key, _shown(value)] for key, value in flatten(config).items()]
    whole = table(["setting", "value"], every, label="All settings", text=[1], wide=True)
    return join([*parts, details("All settings", whole)])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None or value == {} else str(value)


def environment(sessions: Iterable[Mapping[str, Any]]) -> Html:
    """A line for each process that worked on a run, of what `runs.sessions` noted."""
    lines: list[list[object]] = []
    for row in sessions:
        if row.get("event") == "begun":
            torch = f"{row.get('torch')}" + (f", CUDA {row['cuda']}" if row.get("cuda") else "")
            count, processes = row.get("threads"), row.get("processes", 1)
            how = f"{count} thread{'s' * (count != 1)}" + (f", {processes} processes" if processes != 1 else "")
            code = f"{row.get('version')}, commit {row['commit']}" if row.get("commit") else str(row.get("version"))
            lines.append(
                [_moment(row.get("time")), "was stopped", row.get("device"), how, torch, row.get("python"), code]
            )
        elif lines:
            lines[-1][1] = _moment(row.get("time"))
    head = ["began", "finished", "machine", "threads", "torch", "Python", "bilevel_fast"]
    return table(head, lines, label="Environment", text=[1, 2, 3, 4, 5, 6], wide=True)


def _moment(text: Any) -> str:
    return str(text).replace("T", " ").replace("Z", " UTC")


def files(path: Path, known: Mapping[str, str]) -> Html:
    """Links to the files of a run that are there, of those known by name, and what each is."""

    found = [(name, path / name) for name in known if (path / name).exists()]
    sizes = ["" if name.endswith("/") else f", {_bytes(file.stat().st_size)}" for name, file in found]
    links = [join((tag("a", name, href=name), size)) for (name, _), size in zip(found, sizes, strict=True)]
    return facts(zip(links, [known[name] for name, _ in found], strict=True))


def memory(sessions: Iterable[Mapping[str, Any]]) -> tuple[str, str] | None:
    """The most memory that the last session held, in GiB, and what held it; None if nobody noted it."""
    ends = [row for row in sessions if row.get("event") == "finished"]
    if not ends:
        return None
    where = "on the GPU" if ends[-1].get("peak_of") == "GPU" else "resident in the process"
    return number(ends[-1].get("peak_gib")), f"{where}, of the last session"


def _bytes(size: int) -> str:
    return f"{size} bytes" if size < 1000 else f"{size / 1000:.0f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"
