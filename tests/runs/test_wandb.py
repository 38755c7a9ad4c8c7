"""Weights & Biases beside TensorBoard, with its own client, offline: the same scalars, and no training lost."""

import json
import logging
import struct
import time
from dataclasses import replace

import pytest

from bilevel_fast.base.errors import UserError
from bilevel_fast.runs import session
from bilevel_fast.runs.config import VOLATILE, preset
from bilevel_fast.training import loop
from bilevel_fast.training.run_folder import RunFolder
from bilevel_fast.training.stats import scalars
from bilevel_fast.training.wandb_sink import WandbSink

RECORD = {"step": 2, "images": 8, "seconds": 1.5, "images_per_second": 5.0, "nonfinite": {"lower/kd": 1}}
RECORD |= {"lower/loss": 0.25, "lower/kd": None}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "120")  # seconds for its process to start, on a machine that is busy
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def logged(folder, count=1):
    """What runs of W&B have in their files, in the order in which it came.

    W&B's process writes a while after a run has ended: it is waited for until there are `count` records.
    """
    until = time.monotonic() + 30
    while len(found := _logged(folder)) < count and time.monotonic() < until:
        time.sleep(0.05)
    return found


def _logged(folder):
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = [(item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item]
                found.append({name: json.loads(value) for name, value in items if not name.startswith("_")})
    return found


def records(data):
    """Of a log in LevelDB's format: blocks of 32 KiB, of pieces with a checksum, a length and a kind."""
    at, held = 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        held += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield held
            held = b""


def test_the_same_scalars(offline):
    offline.mkdir()
    sink = WandbSink(offline, "student", {"seed": 3})
    sink.write(RECORD)
    sink.close()
    assert logged(offline) == [scalars(RECORD) | {"images": 8}]
    assert scalars(RECORD)["nonfinite/lower/kd"] == 1
    first = (offline / "wandb" / "student.id").read_text()
    WandbSink(offline, "student", {"seed": 3}, 8).close()
    assert (offline / "wandb" / "student.id").read_text() == first, "a run that is resumed is the same one"


@pytest.mark.situation
def test_what_fails_there_ends_no_training(offline, caplog, monkeypatch):
    """W&B's client dies, or its server does not answer: one line says so, and the training goes on."""
    import wandb

    class Broken:
        def define_metric(self, *_, **__):
            pass

        def log(self, _):
            raise ConnectionError("the service\nis gone")

        def finish(self):
            raise AssertionError("it was given up")

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    offline.mkdir()
    sink = WandbSink(offline, "student", {})
    for _ in range(3):
        sink.write(RECORD)
    sink.close()
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    WandbSink(offline, "other", {}).write(RECORD)
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert said == [
        f"no more is sent to Weights & Biases: {why}" for why in ("the service is gone", "division by zero")
    ]


def test_a_run_has_it_if_asked(offline):
    """The student's sinks and the twin's; otherwise there is none."""
    offline.mkdir()
    config = replace(preset("smoke"), out=offline, wandb=True)
    for name in ("student", "distilled"):
        places = session._places(RunFolder(offline), name, config)
        for sink in loop._sinks(places, 0, 0):
            sink.write(RECORD)
            sink.close()
    assert len(logged(offline, 2)) == 2
    assert not session._places(RunFolder(offline), "student", preset("smoke")).further
    assert "wandb" in VOLATILE


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed; run: pip install 'bilevel-fast\[wandb\]'"):
        WandbSink(tmp_path, "student", {})
