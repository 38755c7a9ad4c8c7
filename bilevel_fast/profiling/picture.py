"""A profile to look at: tables of rooms and ops, and a picture of the step."""

import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import replacing, write_atomic, write_json
from bilevel_fast.profiling.profile import TOTAL, OpRow, RoomRow, StepProfile
from bilevel_fast.profiling.trace import OTHER, Work

COLORS = {
    "data": "#7f9fb5",
    "diffusion": "#a7bf6f",
    "teacher": "#3f6fb0",
    "student": "#e08a4a",
    "losses": "#c8505a",
    "backward": "#7a68ac",
    "optimizer": "#4f9f79",
    OTHER: "#d4d4d6",
}
_INK, _DIM = "#28282e", "#77777f"
_WIDTH, _LANE, _TOP, _BOTTOM, _SIDE = 13.0, 1.7, 1.15, 1.0, 0.3  # inches
_LETTER = 0.088  # inches, a letter of the labels
_PIXEL = 1 / 1500  # of the longest step; a shorter gap between kernels is not drawn
_MENTIONED = 0.003  # of the longest step; what is shorter is drawn without a label


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something.

    Raises:
        UserError: It does, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--profile-out {folder} is a file, wanted a folder")
    held = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
    if held and not overwrite:
        raise UserError(f"--profile-out {folder} is not empty; --overwrite replaces the profile in it")


def save(folder: Path, steps: Sequence[StepProfile], about: Mapping[str, Any], trace: Path) -> None:
    """Write profile.json, step.png and trace.json.

    Args:
        about: `machine`, and `config`: the settings.
        trace: Is copied into the folder.
    """
    config, threads = about["config"], about["threads"]
    title = f"One step of each level on {about['device']}"
    subtitle = (
        f"preset {config['preset']}, batch {config['lower']['batch']} and {config['upper']['batch']}, "
        f"torch {about['torch']}, {threads} thread{'s' * (threads > 1)}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "trace.json") as file, trace.open("rb") as made:
        shutil.copyfileobj(made, file)
    write_atomic(folder / "step.png", picture(steps, title, subtitle))
    write_json(folder / "profile.json", {**about, "steps": [fields(step) for step in steps]})


def tables(step: StepProfile, cuda: bool, top: int = 10) -> str:
    """Aligned text: the rooms of a step, and the ops that take most of it."""
    return "\n".join([headline(step), "", *_rooms(step.rooms, cuda), "", *_ops(step.ops[:top], cuda)])


def headline(step: StepProfile) -> str:
    """How long the step takes, in one line."""
    busy = "" if step.busy_ms is None else f", device busy for {step.busy_ms:.2f} ms of it"
    times = "once" if step.repeats == 1 else f"{step.repeats} times"
    return (
        f"{step.name} step, recorded {times}: {step.wall_ms:.2f} ms{busy}; {step.plain_ms:.2f} ms without the profiler"
    )


def _rooms(rows: Sequence[RoomRow], cuda: bool) -> list[str]:
    lines = [f"{'room':<12}{'ms':>10}{'share':>9}{'kernels' if cuda else 'ops':>9}{'TFLOP/s':>10}{'GB/s':>10}"]
    for row in rows:
        if row.room == TOTAL:
            lines.append("-" * len(lines[0]))
        rates = _digits(row.tflop_per_s) + _digits(row.gb_per_s)
        lines.append(f"{row.room:<12}{row.ms:>10.3f}{row.share:>9.1%}{row.launches:>9.0f}{rates}")
    return lines


def _ops(rows: Sequence[OpRow], cuda: bool) -> list[str]:
    lines = [
        f"{'kernel' if cuda else 'op, without the ops it calls':<56}{'room':<12}{'ms':>10}{'share':>9}{'calls':>8}"
    ]
    for row in rows:
        calls = f"{row.calls:.0f}" if row.calls else "-"
        name = row.op if len(row.op) <= 54 else row.op[:51] + "..."
        lines.append(f"{name:<56}{row.room:<12}{row.ms:>10.3f}{row.share:>9.1%}{calls:>8}")
    return lines


def _digits(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:>10.1f}" if value >= 100 else f"{value:>10.3g}"


def fields(step: StepProfile) -> dict[str, Any]:
    """The numbers of the tables, and all ops, for JSON."""
    rows = [{**asdict(r), "tflop_per_s": r.tflop_per_s, "gb_per_s": r.gb_per_s} for r in step.rooms]
    found = {**asdict(step), "rooms": rows}
    del found["timeline"]
    return found


class _Block(NamedTuple):
    """A stay in a room, in ms. `took` leaves out the gaps between the kernels in it."""

    room: str
    start: float
    end: float
    took: float


def blocks(timeline: Sequence[Work], gap: float = inf) -> list[_Block]:
    """Neighbours in the same room as one, unless they are more than `gap` ms apart."""
    found: list[_Block] = []
    for work in timeline:
        start, end = work.start / 1e6, work.end / 1e6
        if found and found[-1].room == work.room and start - found[-1].end <= gap:
            last = found[-1]
            found[-1] = last._replace(end=max(last.end, end), took=last.took + end - start)
        else:
            found.append(_Block(work.room, start, end, end - start))
    return found


def _ms(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f} ms"


def picture(steps: Sequence[StepProfile], title: str, subtitle: str) -> bytes:
    """One lane per step, to one scale, as PNG. On CUDA each kernel is drawn, and white is an idle device."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    longest = max(work.end for step in steps for work in step.timeline) / 1e6
    height = _TOP + _LANE * len(steps) + _BOTTOM
    figure, axes = plt.subplots(len(steps), 1, figsize=(_WIDTH, height), sharex=True, squeeze=False)
    figure.subplots_adjust(
        left=_SIDE / _WIDTH, right=1 - _SIDE / _WIDTH, top=1 - _TOP / height, bottom=_BOTTOM / height, hspace=0.35
    )
    for axis, step in zip(axes[:, 0], steps, strict=True):
        _lane(axis, step, longest)
    axes[-1, 0].set_xlabel("ms", color=_DIM)
    axes[-1, 0].spines["bottom"].set(visible=True, color="#bbbbc0")
    axes[-1, 0].tick_params(length=3)
    shown = {work.room for step in steps for work in step.timeline}
    handles = [Patch(color=color, label=room) for room, color in COLORS.items() if room in shown]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, labelcolor=_INK)
    left = _SIDE / _WIDTH
    figure.text(left, 1 - 0.2 / height, title, fontsize=15, fontweight="bold", color=_INK, va="top")
    figure.text(left, 1 - 0.52 / height, subtitle, fontsize=10, color=_DIM, va="top")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


def _lane(axis: Any, step: StepProfile, longest: float) -> None:
    per_inch = longest / (_WIDTH - 2 * _SIDE)
    drawn = blocks(step.timeline, longest * _PIXEL)
    for room, color in COLORS.items():
        bars = [(block.start, block.end - block.start) for block in drawn if block.room == room]
        axis.broken_barh(bars, (0, 1), facecolors=color, linewidth=0)
    small: list[_Block] = []
    for block in blocks(step.timeline):
        lines = [block.room, _ms(block.took)]
        if block.end - block.start >= (max(map(len, lines)) + 1) * _LETTER * per_inch:
            dark = block.room in ("teacher", "backward", "losses", "optimizer")
            middle = (block.start + block.end) / 2
            ink = "white" if dark else _INK
            axis.text(middle, 0.5, "\n".join(lines), ha="center", va="center", color=ink, fontsize=9.5)
        elif block.took >= _MENTIONED * longest:
            small.append(block)
    _callouts(axis, small, per_inch, longest)
    axis.set(ylim=(-0.75, 1), xlim=(0, longest), yticks=[])
    took = sum(block.took for block in blocks(step.timeline))
    which = "" if step.repeats == 1 else f", the median of {step.repeats}"
    axis.set_title(f"{step.name} step: {_ms(took)}{which}", loc="left", fontsize=11, color=_INK)
    axis.tick_params(colors=_DIM, labelsize=8.5, length=0)
    axis.spines[:].set_visible(False)


def _callouts(axis: Any, small: Sequence[_Block], per_inch: float, longest: float) -> None:
    """Labels below the lane, pushed apart, with a line to what they name."""
    texts = [f"{block.room}\n{_ms(block.took)}" for block in small]
    widths = [(max(map(len, text.split("\n"))) + 1) * _LETTER * 0.9 * per_inch for text in texts]
    places: list[float] = []
    edge = 0.0
    for block, width in zip(small, widths, strict=True):
        places.append(max((block.start + block.end - width) / 2, edge))
        edge = places[-1] + width
    edge = longest
    for index in reversed(range(len(places))):  # back from the right edge
        places[index] = min(places[index], edge - widths[index])
        edge = places[index]
    for block, text, place, width in zip(small, texts, places, widths, strict=True):
        middle, label = (block.start + block.end) / 2, place + width / 2
        axis.plot([middle, middle, label], [0, -0.08, -0.2], color=COLORS[block.room], linewidth=1, clip_on=False)
        axis.text(label, -0.22, text, ha="center", va="top", color=_INK, fontsize=8.5)
