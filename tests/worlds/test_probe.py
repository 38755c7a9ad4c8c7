"""The probe reads drawings that it was not trained on, and says so when they show something else."""

import torch

from bilevel_fast.worlds.mini.probe import Probe, fresh_drawings
from bilevel_fast.worlds.mini.world import Scene


def test_the_shipped_probe_reads_fresh_drawings():
    accuracy = Probe.load().accuracy(*fresh_drawings(per_scene=3, seed=7))
    assert min(accuracy.object, accuracy.color, accuracy.style) >= 0.99


def test_it_reads_them_through_noise():
    images, scenes = fresh_drawings(per_scene=2, seed=8)
    accuracy = Probe.load().accuracy(images + 0.15 * torch.randn_like(images), scenes)
    assert min(accuracy.object, accuracy.color, accuracy.style) >= 0.97


def test_accuracy_is_per_label():
    images, scenes = fresh_drawings(per_scene=1)
    wrong = [Scene((s.object + 1) % 6, s.color, (s.style + (i < 108)) % 6) for i, s in enumerate(scenes)]
    accuracy = Probe.load().accuracy(images, wrong)
    assert accuracy.object < 0.01
    assert accuracy.color > 0.99
    assert abs(accuracy.style - 0.5) < 0.01


def test_features_are_what_the_heads_read():
    """FID is computed on the features, so the verdict must follow from them."""
    probe = Probe.load()
    seen = probe(fresh_drawings(per_scene=1)[0])
    assert seen.features.shape == (216, 64)
    torch.testing.assert_close(probe.heads(seen.features), torch.cat(seen.logits, dim=1))


def test_saved_and_loaded_is_the_same(tmp_path):
    probe = Probe().half().float()  # stored in fp16
    probe.save(tmp_path / "probe.safetensors")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(Probe.load(tmp_path / "probe.safetensors")(images).features, probe(images).features)
