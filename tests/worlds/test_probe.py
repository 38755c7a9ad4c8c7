"""The probe reads drawings that it was not trained on, and says so when they show something else."""

import pytest
import torch

from bilevel_fast.worlds import WORLDS, drawn_world
from bilevel_fast.worlds.emoji.probe import main
from bilevel_fast.worlds.mini.materials import WORLD
from bilevel_fast.worlds.mini.world import Scene
from bilevel_fast.worlds.probe import Probe, fresh_drawings


@pytest.mark.parametrize("name", WORLDS)
def test_the_shipped_probe_reads_fresh_drawings(name):
    world = drawn_world(name)
    accuracy = world.probe.accuracy(*fresh_drawings(world, per_scene=3, seed=7))
    assert set(accuracy.shares) == set(world.heads)
    assert min(accuracy.shares.values()) >= 0.99


@pytest.mark.parametrize("name", WORLDS)
def test_it_reads_them_through_noise(name):
    world = drawn_world(name)
    images, scenes = fresh_drawings(world, per_scene=2, seed=8)
    accuracy = world.probe.accuracy(images + 0.15 * torch.randn_like(images), scenes)
    assert min(accuracy.shares.values()) >= 0.97


def test_accuracy_is_per_label():
    images, scenes = fresh_drawings(WORLD, per_scene=1)
    wrong = [Scene((s.object + 1) % 6, s.color, (s.style + (i < 108)) % 6) for i, s in enumerate(scenes)]
    shares = WORLD.probe.accuracy(images, wrong).shares
    assert shares["object"] < 0.01
    assert shares["color"] > 0.99
    assert abs(shares["style"] - 0.5) < 0.01


def test_features_are_what_the_heads_read():
    """FID is computed on the features, so the verdict must follow from them."""
    probe = WORLD.probe
    seen = probe(fresh_drawings(WORLD, per_scene=1)[0])
    assert seen.features.shape == (216, 64)
    torch.testing.assert_close(probe.heads(seen.features), torch.cat(seen.logits, dim=1))


def test_saved_and_loaded_is_the_same(tmp_path):
    probe = Probe(WORLD.heads).half().float()  # stored in fp16
    probe.save(tmp_path / "probe.safetensors")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(Probe.load(WORLD, tmp_path / "probe.safetensors")(images).features, probe(images).features)


def test_the_command_measures_the_shipped_probe(command):
    code, said, wrong = command(main, "--steps", "0")
    assert (code, wrong) == (0, "")
    assert said.startswith("probe on fresh drawings: ")
    assert "1.000" in said
    assert "--steps 0 measures the shipped probe" in command(main)[2]
