"""The shipped teacher draws what it is asked for, and the recipe that made it runs."""

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from bilevel_fast.base import errors
from bilevel_fast.base.errors import UserError
from bilevel_fast.models.diffusion import Schedule
from bilevel_fast.models.folder import load_folder
from bilevel_fast.models.mini import WordTokenizer
from bilevel_fast.worlds import WORLDS, drawn_world
from bilevel_fast.worlds.emoji.pretrain import SUBJECT as EMOJI
from bilevel_fast.worlds.judge import paint
from bilevel_fast.worlds.mini.pretrain import SUBJECT, main
from bilevel_fast.worlds.mini.world import WORDS
from bilevel_fast.worlds.pretrain import PretrainConfig, Subject, batches
from bilevel_fast.worlds.pretrain import train as train_on

TINY = PretrainConfig(steps=3, batch=2, every=2)
TEACHER = SUBJECT.world.teacher


def train(config: PretrainConfig, subject: Subject = SUBJECT) -> None:
    train_on(subject, config)


@pytest.mark.parametrize("name", WORLDS)
def test_the_shipped_teacher_draws_what_it_is_asked_for(name):
    world = drawn_world(name)
    scenes = world.scenes[:: 13 if name == "mini" else 7]  # 17 and 18 scenes with every label of the mini world's
    folder = load_folder(world.teacher)
    parts = folder.unet(), folder.schedule, folder.text_encoder, folder.vae
    samples = paint(*parts, scenes, seed=3, guidance=3.0, steps=12)
    shares = world.probe.accuracy(samples.images, scenes).shares
    assert min(shares.values()) >= 0.88, shares  # two wrong


@pytest.mark.parametrize("name", WORLDS)
def test_the_shipped_weights_are_small_and_well_formed(name):
    teacher = drawn_world(name).teacher
    weights = sorted(teacher.parent.rglob("*.safetensors"))
    assert [path.parent.name for path in weights] == ["probe", "text_encoder", "unet"]
    assert sum(path.stat().st_size for path in weights) <= 10e6
    assert all(t.dtype == torch.float16 and t.isfinite().all() for path in weights for t in load_file(path).values())
    index = json.loads((teacher / "model_index.json").read_text())
    assert {part for part in index if not part.startswith("_")} == {p.name for p in teacher.iterdir() if p.is_dir()}


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
    run = batches(SUBJECT, replace(TINY, steps=10, batch=100), tokenizer, Schedule.sd(), 12)
    share = torch.cat([(batch.ids == empty).all(1) for batch in run]).float().mean()
    assert share == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("flag", ["--steps", "--batch", "--every"])
def test_nonsense_is_refused_in_one_line(flag, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["pretrain", flag, "-1", "--out", str(tmp_path)])
    assert errors.run(main) == 2
    assert re.fullmatch(rf"error: {flag} is -1; wanted [01] or more\n", capsys.readouterr().err)


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path):
    """Three steps in one go, and two with a checkpoint, then the third."""
    train(replace(TINY, out=tmp_path / "one"))
    train(replace(TINY, out=tmp_path / "two", steps=2, decay=0.5))
    torch_state = (tmp_path / "two.ckpt").read_bytes()
    train(replace(TINY, out=tmp_path / "whole", steps=3, decay=0.5))
    (tmp_path / "two.ckpt").write_bytes(torch_state)
    train(replace(TINY, out=tmp_path / "two", steps=3, decay=0.5))
    whole, two = (load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors") for name in ("whole", "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in whole.items())


def test_a_checkpoint_of_another_training_is_not_taken_for_this_one(tmp_path):
    """Another seed beside a finished training is refused, or begins anew with --overwrite; a lost folder comes back."""
    one = replace(TINY, out=tmp_path / "one")
    train(one)
    made = weights_of(one)
    with pytest.raises(UserError, match=r"one\.ckpt is of another training \(--seed 0\); give its settings"):
        train(replace(one, seed=7))
    shutil.rmtree(tmp_path / "one")
    train(one)
    assert all(torch.equal(tensor, made[name]) for name, tensor in weights_of(one).items())
    train(replace(one, seed=7, overwrite=True))
    assert any(not torch.equal(tensor, made[name]) for name, tensor in weights_of(one).items())


def weights_of(config: PretrainConfig) -> dict[str, torch.Tensor]:
    return load_file(config.out / "unet/diffusion_pytorch_model.safetensors")


def test_another_worlds_teacher_begins_with_this_ones_unet(tmp_path):
    """With a learning rate of almost nothing the UNet stays what it was; its captions are of its own world."""
    train(replace(TINY, out=tmp_path / "start", steps=1, lr=1e-12, ema=0.0), EMOJI)
    before, after = (load_file(f / "unet/diffusion_pytorch_model.safetensors") for f in (TEACHER, tmp_path / "start"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    folder = load_folder(tmp_path / "start")
    assert folder.family.world == "emoji"
    assert folder.text_encoder.mask(["an owl in the style of noto"]).sum() == 9


def test_paraphrases_are_taken_at_the_rate_asked_for():
    texts = [" ".join(map(str, ids)) for ids in _ids(EMOJI, replace(TINY, steps=10, batch=60, rephrase=0.5, drop=0.0))]
    own = {" ".join(map(str, ids.tolist())) for ids in _tokenizer(EMOJI)([s.caption for s in EMOJI.world.scenes])}
    assert sum(text not in own for text in texts) / len(texts) == pytest.approx(0.5 * 4 / 5, abs=0.06)


def _tokenizer(subject: Subject) -> WordTokenizer:
    return WordTokenizer(subject.words)


def _ids(subject: Subject, config: PretrainConfig) -> list[list[int]]:
    run = batches(subject, config, _tokenizer(subject), Schedule.sd(), 12)
    return [ids for batch in run for ids in batch.ids.tolist()]
