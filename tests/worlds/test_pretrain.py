"""The shipped teacher draws what it is asked for, and the recipe that made it runs."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from bilevel_fast.base import errors
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.mini import WordTokenizer
from bilevel_fast.worlds.mini.judge import paint
from bilevel_fast.worlds.mini.pretrain import TEACHER, PretrainConfig, batches, main, train
from bilevel_fast.worlds.mini.probe import Probe
from bilevel_fast.worlds.mini.world import SCENES, WORDS

TINY = PretrainConfig(steps=3, batch=2, every=2)


def test_the_shipped_teacher_draws_what_it_is_asked_for():
    scenes = SCENES[::13]  # 17 scenes with every object, colour and style
    folder = load_folder(TEACHER)
    samples = paint(
        folder.unet(), folder.schedule, folder.text_encoder, folder.vae, scenes, seed=3, guidance=3.0, steps=25
    )
    accuracy = Probe.load().accuracy(samples.images, scenes)
    assert min(accuracy.object, accuracy.color, accuracy.style) >= 0.9


def test_the_shipped_weights_are_small_and_well_formed():
    weights = sorted(TEACHER.parent.rglob("*.safetensors"))
    assert [path.parent.name for path in weights] == ["probe", "text_encoder", "unet"]
    assert sum(path.stat().st_size for path in weights) <= 10e6
    assert all(t.dtype == torch.float16 and t.isfinite().all() for path in weights for t in load_file(path).values())
    index = json.loads((TEACHER / "model_index.json").read_text())
    assert {part for part in index if not part.startswith("_")} == {p.name for p in TEACHER.iterdir() if p.is_dir()}


def test_three_steps_train_and_the_seed_decides(tmp_path):
    weights = {}
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        train(replace(TINY, out=tmp_path / name, seed=seed))
        weights[name] = {
            part: load_file(next((tmp_path / name / part).glob("*.safetensors"))) for part in ("unet", "text_encoder")
        }
    for part, tensors in weights["one"].items():
        assert all(t.isfinite().all() for t in tensors.values())
        assert all(torch.equal(t, weights["same"][part][k]) for k, t in tensors.items())
        assert any(not torch.equal(t, weights["other"][part][k]) for k, t in tensors.items())
    assert load_folder(tmp_path / "one").family.world == "mini"


def test_every_part_of_the_model_learns(tmp_path):
    """Between the snapshots of step 1 and step 3 each matrix of UNet and text encoder has moved."""
    moved = {}
    for steps in (1, 3):
        train(replace(TINY, out=tmp_path / str(steps), steps=steps, warmup=1, lr=1e-2))
        for part in ("unet", "text_encoder"):
            for k, t in load_file(next((tmp_path / str(steps) / part).glob("*.safetensors"))).items():
                moved.setdefault(f"{part}/{k}", []).append(t)
    still = [name for name, (before, after) in moved.items() if torch.equal(before, after)]
    assert still == []


def test_captions_are_dropped_at_the_rate_asked_for():
    tokenizer = WordTokenizer(WORDS)
    empty = tokenizer([""])
    run = batches(replace(TINY, steps=10, batch=100), tokenizer, Schedule.sd(), 12)
    share = torch.cat([(batch.ids == empty).all(1) for batch in run]).float().mean()
    assert share == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("flag", ["--steps", "--batch", "--every"])
def test_nonsense_is_refused_in_one_line(flag, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["pretrain", flag, "-1", "--out", str(tmp_path)])
    assert errors.run(main) == 2
    assert re.fullmatch(rf"error: {flag} is -1; wanted [01] or more\n", capsys.readouterr().err)
