"""Statistics: the right means, no wait for the device, valid JSON whatever came, no step twice."""

import json
import math
import os
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel_fast.training.stats import Console, JsonLines, Means, Stats, tensorboard


class Kept:
    """A sink that keeps its records."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.closed = False

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


def record(step: int, **values: float | None) -> dict[str, Any]:
    header = {"step": step, "images": 16 * step, "seconds": 1.5, "images_per_second": 51.25, "nonfinite": {}}
    return header | values


def read_lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def scalars(device: str = "cpu", **values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, device=device) for name, value in values.items()}


def test_means_start_anew_with_each_record(device: str) -> None:
    stats, lower, upper = Stats(), Means(), Means()
    for value in (1.0, 2.0, 6.0):
        lower.add(scalars(device, loss=value, norm=2 * value))
    upper.add({"upper/loss": torch.tensor([1.5], device=device, requires_grad=True)})
    first = stats.flush(3, 48, [lower, upper], lr=1e-6)
    lower.add({"loss": torch.tensor(5, dtype=torch.int64, device=device), "norm": torch.zeros((), device=device)})
    second = stats.flush(4, 64, [lower, upper])

    assert (first["step"], first["images"], first["nonfinite"]) == (3, 48, {})
    assert (first["loss"], first["norm"], first["upper/loss"], first["lr"]) == (3.0, 6.0, 1.5, 1e-6)
    assert (second["loss"], second["norm"]) == (5.0, 0.0)
    assert second.keys().isdisjoint({"upper/loss", "lr"}), "nothing was added to them"


def test_many_values_are_one_mean_in_fp64(device: str) -> None:
    """In fp32 the small values would be lost beside the large one."""
    means = Means()
    means.add({"loss": torch.tensor(1e8, device=device)})
    for _ in range(999):
        means.add({"loss": torch.tensor(0.5, dtype=torch.bfloat16, device=device)})
    assert means.take() == ({"loss": (1e8 + 999 * 0.5) / 1000}, {})


def test_the_value_counts_not_the_tensor(device: str) -> None:
    """A CUDA graph writes the loss of each step into the same tensor; fp64, where a cast is no copy."""
    means, loss = Means(), torch.zeros((), device=device, dtype=torch.float64)
    for value in (1.0, 3.0):
        means.add({"loss": loss.fill_(value)})
    assert means.take()[0]["loss"] == 2.0


def test_add_reads_nothing_back() -> None:
    """A meta tensor has no value: any read of it raises."""
    means = Means()
    for _ in range(3):
        means.add({"loss": torch.zeros((), device="meta")})


def test_other_names_are_refused() -> None:
    means = Means()
    means.add(scalars(loss=1.0))
    with pytest.raises(ValueError, match="terms kd; before: loss"):
        means.add(scalars(kd=1.0))


@pytest.mark.gpu
def test_add_does_not_wait_for_the_device() -> None:
    means, loss = Means(), torch.ones((), device="cuda")
    means.add({"loss": loss})
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(600):
            means.add({"loss": loss})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert means.take()[0]["loss"] == 1.0


def test_nonfinite_values_are_counted_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Kept()
    means, kd = Means(), Means()
    with Stats([kept, JsonLines(tmp_path / "stats.jsonl"), Console(total=9)]) as stats:
        for value in (1.0, math.nan, 2.0, math.inf, -math.inf):
            means.add(scalars(loss=value))
        kd.add(scalars(kd=math.nan))
        stats.flush(5, 80, [means, kd], lr=math.nan)
    (line,) = read_lines(tmp_path / "stats.jsonl")
    assert line == kept.records[0]
    assert (line["loss"], line["kd"], line["lr"]) == (1.5, None, None)
    assert line["nonfinite"] == {"loss": 3, "kd": 1, "lr": 1}
    shown = capsys.readouterr().err
    assert "loss 1.5 (3 non-finite)" in shown
    assert "kd - (1 non-finite)" in shown
    assert kept.closed


def test_speed_is_of_the_interval_and_time_of_the_run() -> None:
    start = time.perf_counter()
    stats = Stats(images=1000, seconds=60.0)
    time.sleep(0.2)
    before = time.perf_counter()
    first = stats.flush(10, 1160)
    middle = time.perf_counter()
    time.sleep(0.1)
    second = stats.flush(20, 1320)
    end = time.perf_counter()
    assert 60.2 <= first["seconds"] <= 60 + middle - start + 1e-3
    assert 60.3 <= second["seconds"] <= 60 + end - start + 1e-3
    assert 160 / (middle - start) <= first["images_per_second"] <= 160 / 0.2
    assert 160 / (end - before) <= second["images_per_second"] <= 160 / 0.1


def test_a_name_of_the_header_is_refused() -> None:
    with pytest.raises(AssertionError, match="are fields of every record"):
        Means().add(scalars(step=1.0))


@pytest.mark.parametrize("torn", ['{"step": 1', '{"step": 15}'], ids=["half a line", "only the newline missing"])
def test_a_resumed_run_writes_no_step_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture, torn: str) -> None:
    """Killed while it wrote a line, with a checkpoint of step 20."""
    path = tmp_path / "stats.jsonl"
    sink = JsonLines(path)
    for step in (10, 20, 30):
        sink.write(record(step, loss=float(step)))
    assert [line["step"] for line in read_lines(path)] == [10, 20, 30], "each line is in the file at once"
    with path.open("a") as file:
        file.write(torn)

    resumed = JsonLines(path, step=20)
    resumed.write(record(30, loss=-1.0))
    assert [(line["step"], line["loss"]) for line in read_lines(path)] == [(10, 10.0), (20, 20.0), (30, -1.0)]
    assert [entry.getMessage() for entry in caplog.records] == [f"{path} line 4 is not a whole record and is dropped"]


def test_plain_lines_when_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(total=2000, step=100)
    for step in (120, 140):
        console.write(record(step, loss=0.0443219, lr=1e-6))
    console.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 120/2000  1920 images  51.2 img/s  loss 0.04432  lr 1e-06",
        "step 140/2000  2240 images  51.2 img/s  loss 0.04432  lr 1e-06",
    ]


def test_progress_bar_on_a_terminal() -> None:
    controller, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    with os.fdopen(terminal, "w") as stream:
        console = Console(total=200, step=100, stream=stream)
        console.write(record(150, loss=0.0443219))
        console.close()
        drawn = os.read(controller, 65536).decode()
    os.close(controller)
    first, *_, last = filter(None, drawn.replace("\n", "").split("\r"))
    assert "100/200" in first
    assert "75%" in last
    assert "150/200" in last
    assert "51.2 img/s  loss 0.04432" in last


def test_tensorboard_counts_images(tmp_path: Path) -> None:
    sink = tensorboard(tmp_path)
    sink.write(record(1, loss=0.5, kd=None))
    sink.write(record(2, loss=0.25) | {"nonfinite": {"loss": 3}})
    sink.close()
    tensorboard(tmp_path, images=16).close()  # resumed after the first

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(16, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("images_per_second")] == [(16, 51.25)]
    assert "kd" not in events.Tags()["scalars"]


def test_without_tensorboard_one_line_says_so(tmp_path: Path) -> None:
    code = f"""
import logging, sys
sys.modules["tensorboard"] = None  # Python's own way to forbid an import
logging.basicConfig(format="%(message)s")
from pathlib import Path
from bilevel_fast.training.stats import tensorboard
sink = tensorboard(Path({str(tmp_path / "events")!r}))
sink.write({record(1, loss=0.5)})
sink.close()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr == "no TensorBoard events: tensorboard is not installed; run: pip install tensorboard\n"
    assert not (tmp_path / "events").exists()
