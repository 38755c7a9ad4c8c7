"""The stages one after the other. What is finished is kept, so a killed rehearsal goes on; what fails holds up nothing
but what needs it.

    OUT/rows/STAGE.json    the row of a finished stage: there, it is not run again
    OUT/logs/STAGE.log     all that it wrote
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

from benchmarks import ROOT
from benchmarks.real_size.measuring import Taken, environment, run
from benchmarks.real_size.stages import Scale, Stage
from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import read_json, write_json

GIB = 2**30
Row = dict[str, Any]
Runner = Callable[..., Taken]
"""`measuring.run`, or what stands for it."""


@dataclass(frozen=True)
class Done:
    """What became of a stage.

    Attributes:
        row: Of the stage; None if it did not end well.
        why: It counts as failed for this; empty if it does not.
        kept: Whether an earlier session ran it.
    """

    name: str
    row: Row | None
    why: str = ""
    kept: bool = False


def rehearse(
    stages: Sequence[Stage],
    scale: Scale,
    out: Path,
    only: Sequence[str] = (),
    say: Callable[[Done], object] = lambda done: print(line(done)),
    runner: Runner = run,
    machine: Mapping[str, Any] | None = None,
) -> list[Done]:
    """Run what is not finished, in order.

    Args:
        stages: All of them.
        scale: Goes into the rows.
        out: The rehearsal's folder; made if missing.
        only: Names of stages to run anew, and no others.
        say: Called with each stage as it is done.
        runner: Runs a process.
        machine: Fields of every row that say where it was measured.
    """
    out = out.resolve()  # what a stage writes about itself must not depend on where it was started
    for name in ("logs", "rows"):
        (out / name).mkdir(parents=True, exist_ok=True)
    found: list[Done] = []
    for stage in stages:
        rows = {path.stem: read_json(path) for path in (out / "rows").glob("*.json")}
        if only and stage.name not in only:
            continue
        if not only and stage.name in rows:
            found.append(Done(stage.name, rows[stage.name], over(rows[stage.name]), kept=True))
        else:
            found.append(_run(stage, scale, out, rows, runner, machine or {}))
        say(found[-1])
    return found


def _run(
    stage: Stage, scale: Scale, out: Path, rows: Mapping[str, Row], runner: Runner, machine: Mapping[str, Any]
) -> Done:
    if missing := [name for name in stage.needs if name not in rows]:
        return Done(stage.name, None, f"not run: it needs {', '.join(missing)}")
    log, place = out / "logs" / f"{stage.name}.log", out / "rows" / f"{stage.name}.json"
    for path in (log, place, *(out / name for name in stage.makes)):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    settings = {"cwd": out, "log": log, "longest": 2 * stage.seconds, "env": environment(ROOT)}
    sessions: list[Taken] = []
    if stage.kill is not None:
        kill = stage.kill
        sessions.append(runner(stage.command, kill=lambda: kill(out), **settings))
        if sessions[0].code != -SIGKILL or not kill(out):
            return Done(stage.name, None, f"ended with {sessions[0].code} before it could be killed: {_last(log)}")
    command = (*stage.command, *("--resume",) * bool(sessions))
    sessions.append(runner(command, **settings))
    taken = sessions[0] if len(sessions) == 1 else sessions[0].then(sessions[1])
    if taken.code:
        late = f" after {taken.seconds:.0f} s" if taken.code < 0 else ""
        return Done(stage.name, None, f"ended with {taken.code}{late}: {_last(log)}")
    try:
        facts = stage.check(out, rows)
    except (UserError, OSError, KeyError, ValueError) as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return Done(stage.name, None, f"{kind}{error}")
    row = {
        "suite": "real_size", "case": stage.name, "provider": "ours", "metric": "seconds", "unit": "s",
        "value": taken.seconds, "held_gib": taken.held / GIB, "peak_gib": taken.peak / GIB, "limit_s": stage.seconds,
        "limit_gib": stage.gib, "config": {"model": scale.name, "latent": scale.latent}, "found": facts,
        "command": f"python -m {' '.join(command)}", **machine,
    }  # fmt: skip
    if len(sessions) > 1:
        row["sessions_gib"] = [{"held": s.held / GIB, "peak": s.peak / GIB} for s in sessions]
    for name in stage.drop:
        shutil.rmtree(out / name)
    write_json(place, row)
    return Done(stage.name, row, over(row))


def over(row: Mapping[str, Any]) -> str:
    """Which limits a stage exceeded; empty if none."""
    pairs = (("value", "limit_s", "s"), ("held_gib", "limit_gib", "GiB"))
    return ", ".join(
        f"took {row[name]:.4g} {unit}, the limit is {row[limit]:g}"
        for name, limit, unit in pairs
        if row[name] > row[limit]
    )


def _last(log: Path) -> str:
    lines = [text for text in log.read_text(encoding="utf-8", errors="replace").splitlines() if text.strip()]
    return lines[-1][:300] if lines else "it wrote nothing"


def line(done: Done) -> str:
    """What is said about a stage: `ok`, `kept` or `FAILED`, its name, and what it took."""
    word = "FAILED" if done.why else "kept" if done.kept else "ok"
    start = f"{time.strftime('%H:%M:%S')}  {word:<7}{done.name:<20}"
    if done.row is None:
        return f"{start}{done.why}"
    row = done.row
    facts = ", ".join(f"{name} {_shown(value)}" for name, value in row["found"].items() if not isinstance(value, dict))
    took = f"{row['value']:7.1f} s{row['held_gib']:7.2f} GiB held, {row['peak_gib']:.2f} with files"
    return f"{start}{took}  {done.why or facts}"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rows_of(done: Done, out: Path, machine: Mapping[str, Any]) -> list[Row]:
    """The row of a stage, and those that it wrote itself, if it measures: `OUT/STAGE.jsonl`."""
    if done.row is None:
        return []
    inner = out / f"{done.name}.jsonl"
    lines = inner.read_text().splitlines() if inner.is_file() else []
    return [done.row, *(json.loads(text) | {"command": done.row["command"], **machine} for text in lines)]
