"""The run loop around both levels: what is saved, when it stops, and what a resumed run takes back."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.training import checkpoint
from bilevel_fast.training.loop import Interrupted, LoopSettings, Places, Progress, run
from bilevel_fast.training.saver import Pinned
from bilevel_fast.training.student import StudentTraining
from world import B, make_levels, make_models

CPU, EVERY = torch.device("cpu"), 2
SETTINGS = LoopSettings(steps=6, batch=B, log_every=1, checkpoint_every=4, max_bad_steps=2)


def training(lower=(), upper=(), decay=None) -> StudentTraining:
    """Both levels; the gradients of those of their steps that are named are NaN."""
    levels = []
    for level, bad in zip(make_levels(*make_models(), decay=decay), (lower, upper), strict=True):
        flat, number, real = level.optimizer.flat, itertools.count(), level.gradient

        def gradient(batch, flat=flat, number=number, real=real, bad=bad):
            loss = real(batch)
            if next(number) in bad:
                flat.gradient[0] = float("nan")
            return loss

        levels.append(dataclasses.replace(level, gradient=gradient))
    return StudentTraining(*levels, EVERY, CPU, graphs=False)


def fit(trainee, out, stop=False, **settings) -> Progress:
    out.mkdir(exist_ok=True)
    wanted = dataclasses.replace(SETTINGS, **settings)
    return run(trainee, wanted, Places(out / "checkpoints", out / "stats.jsonl"), SimpleNamespace(requested=stop))


def saved(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_what_a_checkpoint_holds(tmp_path):
    """The layout that runs of earlier releases have left: names, and the order of the counters."""
    trainee = training(decay=0.9)
    progress = fit(trainee, tmp_path)
    assert progress == Progress(6, 3, 6 * B, progress.seconds)
    assert saved(tmp_path) == ["step-000004", "step-000006"]
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert list(found.optimizers) == ["lower", "upper", "average"]
    state = json.loads((tmp_path / "checkpoints" / "step-000004" / "state.json").read_text())
    assert list(state) == ["step", "upper_steps", "images", "seconds"]
    assert (state["step"], state["upper_steps"], state["images"]) == (4, 2, 4 * B)
    master, average = trainee.flat.state_dict(), trainee.flat.state_dict(trainee.flat.average)
    assert all(torch.equal(found.tensors[name], value) for name, value in master.items())
    assert all(torch.equal(found.optimizers["average"][name], value) for name, value in average.items())
    assert fit(training(decay=0.9), tmp_path) == progress, "nothing is left to do"


def test_checkpoints_by_a_thread_are_the_same(tmp_path, monkeypatch):
    """As on a GPU: steps go on while the one before is written, and it is there when the run is over."""
    fit(training(decay=0.9), tmp_path / "plain", checkpoint_every=1)
    monkeypatch.setattr("bilevel_fast.training.loop.snapshots_for", lambda flat: Pinned(CPU))
    fit(training(decay=0.9), tmp_path / "behind", checkpoint_every=1)
    with pytest.raises(Interrupted):
        fit(training(decay=0.9), tmp_path / "stopped", stop=True)
    assert saved(tmp_path / "stopped") == ["step-000001"]
    for step in ("step-000005", "step-000006"):
        for name in ("model.safetensors", "optimizer.safetensors", "optimizer.json"):
            plain, behind = (tmp_path / run / "checkpoints" / step / name for run in ("plain", "behind"))
            assert plain.read_bytes() == behind.read_bytes(), (step, name)


def test_a_run_that_was_asked_to_stop_saves_the_step_it_is_at(tmp_path):
    whole, parts = training(), training()
    fit(whole, tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped after lower step 1 of 6"):
        fit(training(), tmp_path / "parts", stop=True)
    assert saved(tmp_path / "parts") == ["step-000001"]
    fit(parts, tmp_path / "parts")
    assert torch.equal(whole.flat.master, parts.flat.master)
    lines = [json.loads(line)["step"] for line in (tmp_path / "parts" / "stats.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("name", "bad"), [("lower", (4, 5)), ("upper", (1, 2))])
def test_bad_steps_in_a_row_end_the_run_with_the_weights_before_them(tmp_path, name, bad):
    trainee = training(**{name: bad})
    message = rf"the last 2 {name} steps had .* stopped at lower step 6, .* saved in .*; lower --{name}\.lr"
    with pytest.raises(UserError, match=message) as refused:
        fit(trainee, tmp_path, steps=8, checkpoint_every=100)
    assert "\n" not in str(refused.value)
    assert saved(tmp_path) == ["step-000006"]
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found.optimizers[name]["bad_in_a_row"] == 2
    assert found.optimizers[name]["rule"]["done"] == found.optimizers[name]["steps"] - 2
    assert all(value.isfinite().all() for value in found.tensors.values())


def test_bad_steps_with_a_good_one_between_them_are_skipped(tmp_path):
    trainee = training(lower=(1, 3))
    assert fit(trainee, tmp_path).step == 6
    records = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [r["nonfinite"] for r in records] == [{}, {"lower/grad_norm": 1}, {}, {"lower/grad_norm": 1}, {}, {}]
    assert trainee.flat.master.isfinite().all()


def test_a_checkpoint_of_another_student_is_refused(tmp_path):
    fit(training(decay=0.9), tmp_path, steps=4)
    folder = tmp_path / "checkpoints"
    found = checkpoint.latest(folder)
    tensors = {name: value for name, value in found.tensors.items() if name != "conv_in.weight"}
    checkpoint.save(folder, 5, tensors, found.optimizers, found.state)
    with pytest.raises(UserError, match=r"checkpoint 5 in .* does not fit this student: conv_in.weight is missing$"):
        fit(training(decay=0.9), tmp_path)
    checkpoint.save(folder, 5, found.tensors, {"lower": found.optimizers["lower"]}, found.state)
    with pytest.raises(UserError, match=r"checkpoint 5 in .* does not fit this student: 'upper'"):
        fit(training(decay=0.9), tmp_path)
