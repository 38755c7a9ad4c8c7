"""Where the time of a step goes: steps by hand, levels, and the steps of the smoke preset."""

import io
import json
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor
from torch import nn

from bilevel_fast import profile
from bilevel_fast.base import errors
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.macs import count
from bilevel_fast.models.structure import Structure
from bilevel_fast.profiling.picture import COLORS, blocks, picture
from bilevel_fast.profiling.profile import TOTAL, StepProfile, descents, measure, timed
from bilevel_fast.profiling.trace import OTHER, OUTSIDE, Work
from bilevel_fast.runs.config import TrainConfig, preset
from bilevel_fast.training import phases
from bilevel_fast.training.phases import PHASES, phase
from bilevel_fast.training.teacher import Teacher
from bilevel_fast.worlds.mini import TEACHER
from replay import on_the_cpu
from world import make_levels, make_models

CPU = torch.device("cpu")
PAUSE = 0.05  # seconds


# --- steps by hand ----------------------------------------------------------------------------


def profiled(steps, device: torch.device, folder: Path, repeats: int = 2) -> tuple[list[StepProfile], list[dict]]:
    times = dict.fromkeys(steps, repeats)
    found = measure(steps, device, times, timed(steps, device, times, warmup=1), folder / "trace.json")
    return found, json.loads((folder / "trace.json").read_text())["traceEvents"]


def rows_of(step: StepProfile) -> dict:
    return {row.room: row for row in step.rooms}


def adds_up(step: StepProfile) -> None:
    rows = rows_of(step)
    assert list(rows) == [*PHASES, OTHER, TOTAL]
    parts = [rows[name] for name in (*PHASES, OTHER)]
    for amount in ("ms", "share", "launches", "flops", "bytes"):
        assert sum(getattr(row, amount) for row in parts) == pytest.approx(getattr(rows[TOTAL], amount), rel=1e-9)
    assert rows[TOTAL].share == pytest.approx(1)
    assert sum(op.ms for op in step.ops) == pytest.approx(rows[TOTAL].ms, rel=1e-9)
    assert sum(op.share for op in step.ops) == pytest.approx(1)


class Toy:
    """A step with a slow teacher, a student with a loss in it, and nothing else."""

    def __init__(self, device: torch.device, pause: float):
        self.x = torch.randn(32, 64, device=device)
        self.teacher, self.student = (nn.Linear(64, 128, bias=False, device=device) for _ in range(2))
        self.pause, self.calls = pause, 0

    def __call__(self) -> None:
        self.calls += 1
        with phase("teacher"), torch.no_grad():
            target = self.teacher(self.x)
            time.sleep(self.pause)
        with phase("student"):
            out = self.student(self.x)
            with phase("losses"):
                loss = (out - target).square().mean()
        self.x.add(1)
        with phase("backward"):
            loss.backward()


def test_a_slow_room_shows(tmp_path):
    toys = {"lower": Toy(CPU, PAUSE), "upper": Toy(CPU, 0)}
    (lower, upper), _ = profiled(toys, CPU, tmp_path, repeats=3)
    adds_up(lower)
    adds_up(upper)
    rows = rows_of(lower)
    assert rows["teacher"].ms >= PAUSE * 1e3
    assert rows["data"].ms == rows["optimizer"].ms == 0
    assert rows["losses"].ms > 0
    assert lower.plain_ms >= PAUSE * 1e3
    assert lower.wall_ms == pytest.approx(rows[TOTAL].ms)
    assert lower.busy_ms is None
    slept = {(op.op, op.room): op.ms for op in lower.ops}
    assert slept[OUTSIDE, "teacher"] >= PAUSE * 1e3
    # one to warm up, three without the profiler, one to start it, three with it, one to count
    assert (lower.repeats, toys["lower"].calls) == (3, 9)


def test_work_is_counted_where_it_is_done(tmp_path):
    (lower,), _ = profiled({"lower": Toy(CPU, 0)}, CPU, tmp_path)
    rows = rows_of(lower)
    product = 2 * 32 * 64 * 128
    # backward: the gradient of the weight; the input wants none
    assert [rows[name].flops for name in ("teacher", "student", "losses", "backward", OTHER)] == [
        product, product, 0, product, 0,
    ]  # fmt: skip
    assert (rows["teacher"].launches, rows[OTHER].launches) == (1, 1)
    assert rows[OTHER].bytes == 2 * 32 * 64 * 4
    assert rows["teacher"].bytes == 4 * (32 * 64 + 64 * 128 + 32 * 128)
    teacher = rows["teacher"]
    assert teacher.tflop_per_s == pytest.approx(product / (teacher.ms * 1e-3) / 1e12)
    assert teacher.gb_per_s == pytest.approx(teacher.bytes / (teacher.ms * 1e-3) / 1e9)
    assert rows["data"].tflop_per_s is None


def test_the_trace_holds_the_ranges(tmp_path):
    _, events = profiled({"lower": Toy(CPU, 0), "upper": Toy(CPU, 0)}, CPU, tmp_path, repeats=3)
    names = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    assert [name for name in names if name.startswith("step/")] == ["step/lower"] * 3 + ["step/upper"] * 3
    for name in ("teacher", "student", "losses", "backward"):
        assert names.count(f"room/{name}") == 6


def test_ranges_are_off_again_after_an_error(tmp_path):
    calls = []

    def fails() -> None:
        calls.append(phases._annotated)
        if phases._annotated:
            raise KeyError

    with pytest.raises(KeyError):
        profiled({"lower": fails}, CPU, tmp_path)
    assert calls[-1]
    assert not phases._annotated


@pytest.mark.gpu
def test_kernels_of_a_gpu(tmp_path):
    device = torch.device("cuda")
    (lower,), _ = profiled({"lower": Toy(device, PAUSE)}, device, tmp_path, repeats=4)
    adds_up(lower)
    rows = rows_of(lower)
    assert rows["teacher"].launches == 1
    assert rows["backward"].launches >= 2  # launched by a thread of autograd's
    assert rows[OTHER].launches == 1
    assert 0 < lower.busy_ms <= rows[TOTAL].ms * (1 + 1e-9)
    assert rows["teacher"].ms < PAUSE * 1e3 <= lower.wall_ms  # the host slept, no kernel did


# --- steps of the engine ----------------------------------------------------------------------


def of_world(record, folder: Path) -> tuple[list[StepProfile], bool]:
    levels = make_levels(*make_models())
    return descents(levels, CPU, {"lower": 2, "upper": 1}, 0, record, folder / "trace.json")


def test_levels_are_timed_as_graphs_and_profiled_without(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_FAST_OPS", "torch")  # native code reads its numbers on the CPU, as no graph can
    replays = []

    def record(call):
        replay, terms = on_the_cpu(call)
        return lambda: (replays.append(phases._annotated), replay()), terms

    steps, recorded = of_world(record, tmp_path)
    assert recorded
    # each level: its first replay, at the end of its warm-up, and all that are timed; none is profiled
    assert replays == [False] * (2 + 2 + 1)
    for step in steps:
        adds_up(step)
        times = {row.room: row.ms for row in step.rooms}
        assert min(times[name] for name in PHASES if name != "data") > 0


def test_levels_that_cannot_be_recorded(tmp_path):
    def record(call):
        raise RuntimeError("no graph today")

    steps, recorded = of_world(record, tmp_path)
    assert not recorded
    assert [(step.name, step.repeats) for step in steps] == [("lower", 2), ("upper", 1)]


# --- tables and picture -----------------------------------------------------------------------


def made_up(**changes) -> StepProfile:
    ms = 1_000_000
    timeline = [Work(0, ms, "teacher"), Work(ms, 4 * ms, "backward"), Work(4 * ms, 4 * ms + 1000, "losses")]
    step = StepProfile("lower", 1, wall_ms=4, plain_ms=3, busy_ms=None, rooms=[], ops=[], timeline=timeline)
    return replace(step, **changes)


def test_blocks():
    timeline = [Work(0, 10, "a"), Work(12, 20, "a"), Work(20, 30, "b"), Work(40, 50, "a")]
    assert [(b.room, round(b.start * 1e6), round(b.end * 1e6), round(b.took * 1e6)) for b in blocks(timeline)] == [
        ("a", 0, 20, 18), ("b", 20, 30, 10), ("a", 40, 50, 10),
    ]  # fmt: skip
    assert len(blocks(timeline, gap=1e-6)) == 4


def test_the_picture_is_to_scale():
    image = Image.open(io.BytesIO(picture([made_up(), made_up(name="upper")], "title", "subtitle"))).convert("RGB")
    assert image.width == 1560
    assert 400 < image.height < 1000
    column = [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]
    areas = {name: column.count(ImageColor.getrgb(COLORS[name])) for name in ("teacher", "backward")}
    assert areas["backward"] / areas["teacher"] == pytest.approx(3, rel=0.05)
    assert areas["teacher"] > 2 * 300 * 80


# --- the command ------------------------------------------------------------------------------


def command(monkeypatch, capsys, *flags: str | Path) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["profile", *map(str, flags)])
    code = errors.run(profile.main)
    return code, *capsys.readouterr()


def test_the_steps_of_a_run(small_teacher, tmp_path, monkeypatch, capsys):
    """The smoke preset with a sleepy teacher: rooms, FLOPs of the teacher, files, and what is printed."""
    made = Teacher.__init__

    def sleepy(self, unet):
        made(self, unet)
        unet.register_forward_pre_hook(lambda *_: time.sleep(PAUSE))

    monkeypatch.setattr(Teacher, "__init__", sleepy)
    out = tmp_path / "profile"
    flags = ["--preset", "smoke", "--steps", "2", "--warmup", "0", "--device", "cpu", "--profile-out", out]
    flags += ["--teacher", small_teacher]
    code, printed, complaint = command(monkeypatch, capsys, *flags)
    assert code == 0, complaint

    saved = json.loads((out / "profile.json").read_text())
    assert saved["config"]["lower"]["batch"] == 4
    assert saved["threads"] == torch.get_num_threads()
    assert not saved["graphs"]
    lower, upper = saved["steps"]
    assert [(s["name"], s["repeats"]) for s in saved["steps"]] == [("lower", 2), ("upper", 1)]
    folder = load_folder(small_teacher)
    dense = count(Structure.dense(folder.config), folder.config.sample_size, folder.text_encoder.length)
    for step, images in ((lower, 4), (upper, 8)):
        rows = {row["room"]: row for row in step["rooms"]}
        assert all(rows[name]["ms"] > 0 for name in PHASES)
        assert sum(rows[name]["ms"] for name in (*PHASES, OTHER)) == pytest.approx(rows[TOTAL]["ms"])
        assert rows["teacher"]["flops"] == 2 * images * dense.products
        assert rows["backward"]["flops"] > rows["student"]["flops"] > 0
        slept = [op["ms"] for op in step["ops"] if (op["op"], op["room"]) == (OUTSIDE, "teacher")]
        assert slept[0] >= PAUSE * 1e3

    ranges = [e["name"] for e in json.loads((out / "trace.json").read_text())["traceEvents"] if "name" in e]
    assert {f"room/{name}" for name in PHASES} <= set(ranges)
    assert Image.open(out / "step.png").size[0] == 1560
    assert sorted(path.name for path in out.iterdir()) == ["profile.json", "step.png", "trace.json"]

    shares = [float(line.split()[2].rstrip("%")) for line in printed.splitlines() if line.split()[:1] in rows_printed()]
    assert len(shares) == 2 * (len(PHASES) + 1)
    assert sum(shares) == pytest.approx(200, abs=0.05 * len(shares))

    code, _, complaint = command(monkeypatch, capsys, *flags)
    assert (code, complaint) == (
        2,
        f"error: --profile-out {out} is not empty; --overwrite replaces the profile in it\n",
    )


def rows_printed() -> list[list[str]]:
    return [[name] for name in (*PHASES, OTHER)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stps", "3"], "there is no flag '--stps'; did you mean '--steps'"),
        (["--lower.stepz", "3"], "there is no flag '--lower.stepz'; did you mean '--lower.steps'"),
        (["--profile-outt", "x"], "did you mean '--profile-out'"),
        (["--steps", "0"], "--steps 0 --warmup 2: wanted at least 1 and at least 0"),
        (["--preset", "mina"], "preset 'mina' does not exist; did you mean 'mini'?"),
        (["--preset", "paper"], "preset 'paper' is for folders"),
        (["--erase", "wave"], "style 'wave' does not exist"),
        (["--teacher", "nowhere"], "model folder nowhere does not exist"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--profile-out", str(TEACHER / "model_index.json")], "is a file, wanted a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, complaint = command(monkeypatch, capsys, *flags)
    assert code == 2
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert message in complaint
    assert list(tmp_path.iterdir()) == []


def test_flags_of_train_are_flags_of_profile():
    config = profile.parse(["--preset", "smoke", "--upper.every", "2", "--steps", "3"])
    assert (config.steps, config.upper.every, config.lower) == (3, 2, preset("smoke").lower)
    folders = ["--teacher", "t", "--data", "d", "--concepts", "c"]
    for argv, name in (([], "mini"), (folders, "paper"), ([*folders, "--preset", "released"], "released")):
        mine = profile.parse(argv)
        for field in fields(TrainConfig):
            if field.name not in ("teacher", "data", "concepts"):
                assert getattr(mine, field.name) == getattr(preset(name), field.name)
    with pytest.raises(UserError, match=r"--data given without --teacher"):
        profile.parse(["--data", "x"])
