"""FID on real Inception features, of random weights: against torchmetrics, scipy and clean-fid's definition."""

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from bilevel_fast.base.errors import UserError
from bilevel_fast.metrics import fid as module
from bilevel_fast.metrics.fid import Inception, fid, load_statistics, resized, save_statistics
from bilevel_fast.metrics.frechet import FrechetStatistics, Moments, frechet_distance, resampled_distances
from bilevel_fast.metrics.images import Batching
from measuring import doodle, inception_file

SHOWN = 64  # features that torchmetrics and scipy get: their cost is cubic


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    return Inception.load(inception_file(tmp_path_factory.mktemp("weights") / "pt_inception.pth"), batching=Batching(5))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets of pictures, the second darker, smaller and larger than what Inception takes."""
    found = []
    for name, sides in (("a", (64, 320)), ("b", (48, 400))):
        folder = tmp_path_factory.mktemp(name)
        for n in range(5):
            image = doodle(n + 100 * len(found), sides[n % 2])
            (image if name == "a" else image.point(lambda v: v * 3 // 4)).save(folder / f"{n}.png")
        found.append(sorted(folder.iterdir()))
    return found


@pytest.fixture(scope="module")
def features(inception, sets):
    return [torch.cat(list(inception.features(files))) for files in sets]


def direct(a, b):
    """The published formula in numpy, with scipy's root of the product."""
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(A @ B).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * np.trace(root)


class Given(nn.Module):
    """As torchmetrics takes a network of one's own; what it is given are features already."""

    num_features = SHOWN

    def forward(self, features):
        return features


def test_against_torchmetrics_and_scipy_on_the_same_features(features):
    theirs = FrechetInceptionDistance(feature=Given())
    theirs.set_dtype(torch.float64)
    a, b = (found[:, :SHOWN] for found in features)
    theirs.update(a, real=False)
    theirs.update(b, real=True)
    ours = frechet_distance(FrechetStatistics.of(a), FrechetStatistics.of(b))
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-3)
    # fewer pictures than features: scipy's root of a singular product needs a hair of full rank, as in pytorch-fid
    noise = np.random.default_rng(0).normal(size=(2000, SHOWN))
    a, b = (np.concatenate([found.double().numpy(), found.double().mean(0).numpy() + 0.05 * noise]) for found in (a, b))
    ours = frechet_distance(*(FrechetStatistics.of(torch.from_numpy(found)) for found in (a, b)))
    assert ours == pytest.approx(direct(a, b), rel=1e-3)


@pytest.mark.parametrize("side", [64, 512])
def test_pixels_are_those_of_clean_fid(tmp_path, side):
    """Bilinear without antialiasing: half a pixel off centre, edges repeated, nothing rounded."""
    doodle(1, side).save(tmp_path / "a.png")
    image = np.asarray(Image.open(tmp_path / "a.png")).astype(float)
    at = ((np.arange(299) + 0.5) * side / 299 - 0.5).clip(0, side - 1)
    low = np.floor(at).astype(int)
    high, share = (low + 1).clip(max=side - 1), at - low
    rows = image[low] * (1 - share)[:, None, None] + image[high] * share[:, None, None]
    both = rows[:, low] * (1 - share)[None, :, None] + rows[:, high] * share[None, :, None]
    np.testing.assert_allclose(resized(tmp_path / "a.png").permute(1, 2, 0), both, rtol=0, atol=0.01)


def test_the_reference_is_first_made_square_by_pil(tmp_path):
    doodle(1, 200).resize((200, 120)).save(tmp_path / "a.png")
    Image.open(tmp_path / "a.png").resize((96, 96), Image.Resampling.BICUBIC).save(tmp_path / "b.png")
    assert torch.equal(resized(tmp_path / "a.png", 96), resized(tmp_path / "b.png"))
    assert not torch.equal(resized(tmp_path / "a.png", 96), resized(tmp_path / "a.png"))


def test_the_network_is_torch_fidelitys_with_the_other_scale(inception):
    """x / 127.5 - 1 of ours is (x - 128) / 128 of theirs at pixels that are moved accordingly."""
    pixels = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    (theirs,) = inception.network(pixels)
    moved = ((pixels.float() - 128) / 128 + 1) * 127.5
    torch.testing.assert_close(inception(moved), theirs, rtol=1e-3, atol=1e-4)
    assert (inception(pixels.float()) - theirs).abs().max() > 1e-3


def test_draws_are_distances_of_resamples(features):
    a, b = (found[:, :40] for found in features)
    reference = FrechetStatistics.of(torch.cat([b, torch.randn(300, 40)]))
    rng = np.random.default_rng(1)
    for count in (len(a), 120):  # fewer and more pictures than features
        x = torch.cat([a, torch.rand(count - len(a), 40)])
        draws = [rng.integers(0, count, count) for _ in range(3)]
        counts = [torch.from_numpy(np.bincount(drawn, minlength=count)) for drawn in draws]
        expected = [frechet_distance(FrechetStatistics.of(x[drawn]), reference) for drawn in draws]
        assert list(resampled_distances(x, reference, counts)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_statistics_come_back(tmp_path, inception, features, suffix):
    kept = FrechetStatistics.of(features[0])
    save_statistics(tmp_path / f"s{suffix}", kept, inception)
    found = load_statistics(tmp_path / f"s{suffix}", inception)
    torch.testing.assert_close(found.mean, kept.mean, rtol=0, atol=0)
    torch.testing.assert_close(found.covariance, kept.covariance, rtol=1e-12, atol=0)
    if suffix == ".npz":
        with np.load(tmp_path / "s.npz", allow_pickle=False) as held:
            assert set(held) == {"mu", "sigma"}
            np.testing.assert_allclose(held["sigma"], np.cov(features[0].double(), rowvar=False), atol=1e-9)


def test_statistics_that_do_not_fit(tmp_path, inception, features):
    kept = FrechetStatistics.of(features[0])
    kept.save(tmp_path / "other.safetensors", {"definition": module.DEFINITION, "weights": "of another file"})
    with pytest.raises(UserError, match="made with other Inception weights"):
        load_statistics(tmp_path / "other.safetensors", inception)
    np.savez(tmp_path / "few.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(UserError, match="have 64 features; wanted 2048"):
        load_statistics(tmp_path / "few.npz", inception)
    np.savez(tmp_path / "names.npz", mean=np.zeros(64))
    with pytest.raises(UserError, match="lack 'mu' or 'sigma'"):
        load_statistics(tmp_path / "names.npz", inception)
    np.savez(tmp_path / "shape.npz", mu=np.zeros(4), sigma=np.eye(5))
    with pytest.raises(UserError, match="do not fit"):
        load_statistics(tmp_path / "shape.npz", inception)
    np.savez(tmp_path / "trap.npz", mu=np.array([{"a": 1}], dtype=object), sigma=np.eye(1))
    with pytest.raises(UserError, match=r"no \.npz of numbers"):
        load_statistics(tmp_path / "trap.npz", inception)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "few.npz").read_bytes()[:100])
    with pytest.raises(UserError, match="cut short"):
        load_statistics(tmp_path / "cut.npz", inception)
    for name in ("nowhere.npz", "nowhere.safetensors"):
        with pytest.raises(UserError, match="nowhere"):
            load_statistics(tmp_path / name, inception)
    with pytest.raises(UserError, match=r"wanted \.npz or \.safetensors"):
        load_statistics(tmp_path / "s.pkl", inception)


def test_weights_of_every_container_are_the_same_network(tmp_path, inception):
    inception_file(tmp_path / "w.pth", legacy=False)
    save_file(torch.load(tmp_path / "w.pth", weights_only=True), tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        state = Inception.load(tmp_path / name).network.state_dict()
        assert all(torch.equal(tensor, state[n]) for n, tensor in inception.network.state_dict().items())


def test_torchvisions_inception_is_another(tmp_path):
    """Its classifier has 1000 classes, and it has an auxiliary one."""
    state = torch.load(inception_file(tmp_path / "w.pth"), weights_only=True)
    state |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000), "AuxLogits.fc.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"1 too many, first 'AuxLogits.fc.weight'; 'fc.weight' is \(1000, 2048\) and not"
    ):
        Inception.load(tmp_path / "w.pth")


def test_a_folder_is_seen_once(inception, sets, monkeypatch):
    folder, seen = sets[0][0].parent, []
    few = Inception(inception.network, inception.weights, Batching(9))
    monkeypatch.setattr(few, "features", lambda files, size: seen.append(files) or [torch.rand(3, 2048)])
    assert few.of_folder(folder, 64) is few.of_folder(folder, 64)
    assert seen == [sets[0]]
    few.of_folder(folder, 32)
    assert len(seen) == 2


def test_one_picture_has_no_covariance(inception, sets):
    with pytest.raises(UserError, match="at least 2 samples"):
        fid(sets[0][:1], Moments(torch.zeros(2048).double(), torch.eye(2048).double()), inception, draws=0, seed=0)
