"""Pixel unshuffle: exact both ways, latents of unit variance."""

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.models.mini import PixelUnshuffleVAE
from bilevel_fast.worlds.mini.materials import WORLD
from bilevel_fast.worlds.probe import fresh_drawings


def test_images_come_back():
    vae = PixelUnshuffleVAE()
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    mean = vae.moments(images)[:, : vae.channels]
    assert mean.shape == (3, 12, 16, 16)
    torch.testing.assert_close(vae.decode(mean), images, rtol=0, atol=1e-6)


def test_a_latent_position_is_a_square_of_pixels():
    images = torch.zeros(1, 3, 32, 32)
    images[0, :, 6:8, 10:12] = 0.5
    mean = PixelUnshuffleVAE(scaling_factor=2, shift_factor=0.25).moments(images)[0, :12]
    expected = torch.full((12, 16, 16), -0.5)
    expected[:, 3, 5] = 0.5
    torch.testing.assert_close(mean, expected)


def test_sampling_the_posterior_gives_the_mean():
    mean, logvar = PixelUnshuffleVAE().moments(torch.rand(1, 3, 32, 32)).chunk(2, dim=1)
    sampled = mean + (logvar / 2).exp() * torch.randn_like(mean)
    torch.testing.assert_close(sampled, mean, rtol=0, atol=2e-6)


def test_latents_of_the_drawn_world_are_standard():
    images, _ = fresh_drawings(WORLD, per_scene=2)
    latents = PixelUnshuffleVAE().moments(images)[:, :12]
    assert abs(latents.mean()) < 0.02
    assert abs(latents.std() - 1) < 0.02


def test_decoded_images_stay_in_range():
    assert PixelUnshuffleVAE().decode(torch.full((1, 12, 2, 2), 9.0)).max() == 1.0


def test_saved_and_loaded_is_the_same(tmp_path):
    vae = PixelUnshuffleVAE(scaling_factor=1.5, shift_factor=0.1)
    vae.save(tmp_path / "vae")
    assert PixelUnshuffleVAE.load(tmp_path / "vae") == vae


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"_class_name": "AutoencoderKL"}', "_class_name is 'AutoencoderKL', wanted 'PixelUnshuffleVAE'"),
        ('{"_class_name": "PixelUnshuffleVAE", "block": 2}', "'scaling_factor' is missing"),
        (
            '{"_class_name": "PixelUnshuffleVAE", "scaling_factor": "much", "shift_factor": 0, "block": 2}',
            "could not convert string to float: 'much'",
        ),
    ],
)
def test_a_foreign_config_is_named(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        PixelUnshuffleVAE.load(tmp_path)
