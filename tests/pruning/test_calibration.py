"""What a pruning method may try the teacher on."""

import pytest
import torch

from bilevel_fast.base.errors import UserError
from bilevel_fast.data.cache import Index
from bilevel_fast.data.writer import CacheWriter
from bilevel_fast.models.folder import load_folder
from bilevel_fast.pruning import CalibrationSet, calibration_set
from bilevel_fast.runs.sources import image_source
from mini_folder import make_mini_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return load_folder(make_mini_folder(tmp_path_factory.mktemp("models") / "teacher"))


def test_calibration_on_the_mini_world(folder):
    """Whole batches, the same ones again, others for another seed; text that the encoder gives."""

    def drawn(images=64, seed=0):
        source = image_source(folder, None, images, seed)
        return calibration_set(folder, source, images=images, batch=4, seed=seed)

    found = drawn(11)
    assert [(tuple(x.shape), tuple(c.shape)) for x, c in found] == [((4, 12, 16, 16), (4, 12, 64))] * 2
    again, other = drawn(11), drawn(seed=1)
    assert torch.equal(found[1][0], again[1][0])
    assert torch.equal(found[1][1], again[1][1])
    assert not torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], other[0][0])
    assert len(other) == 16


def test_calibration_from_a_cache(folder, tmp_path):
    def write(name, kind="images", vae=folder.vae_fingerprint, anchor=None):
        writer = CacheWriter(tmp_path / name, Index(kind=kind, latent_shape=(12, 8, 8), vae=vae))
        for i in range(5):
            mean = torch.full((1, 12, 8, 8), float(i))
            writer.add(torch.cat([mean, torch.full_like(mean, -30.0)], dim=1), ["a red star"], anchor)
        writer.finish()
        return tmp_path / name

    source = image_source(folder, write("cache"), 64, 0)
    ((latents, text),) = calibration_set(folder, source, images=64, batch=64)
    assert sorted(latents.mean(dim=(1, 2, 3)).round(decimals=3).tolist()) == [0, 1, 2, 3, 4]
    assert text.shape == (5, 12, 64)
    with pytest.raises(UserError, match="is a cache of concepts, wanted one of images"):
        image_source(folder, write("bank", kind="concepts", anchor="a star"), 64, 0)
    with pytest.raises(UserError, match="latents of VAE other, the model has VAE"):
        image_source(folder, write("foreign", vae="other"), 64, 0)
    with pytest.raises(UserError, match="images of the calibration set: 0, wanted 1 or more"):
        calibration_set(folder, source, images=0)
    with pytest.raises(UserError, match="--images is 0, wanted 1 or more"):
        image_source(folder, None, 0, 0)
    assert len(calibration_set(folder, None)) == 0


def test_timesteps_cover_the_noise_process():
    t = CalibrationSet(seed=4).timesteps(16)
    assert (t * 16 // 1000).tolist() == list(range(16))
    assert not torch.equal(t, CalibrationSet(seed=5).timesteps(16))
    assert CalibrationSet().timesteps(1000).tolist() == list(range(1000))
