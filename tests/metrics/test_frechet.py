"""Frechet distance against scipy's matrix root and closed forms; statistics against numpy."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.linalg import sqrtm

from bilevel_fast.base.errors import UserError
from bilevel_fast.metrics.frechet import FrechetStatistics, frechet_distance


def features(count, width, rank=None, shift=0.0):
    """Correlated features of the given rank, with variances over two orders of magnitude."""
    rank = rank or width
    scale = torch.logspace(0, -1, rank, dtype=torch.float64)
    directions = torch.randn(rank, width, dtype=torch.float64)
    return (torch.randn(count, rank, dtype=torch.float64) * scale) @ directions + shift


def published(a, b):
    """The formula of the FID paper on plain numpy moments."""
    a, b = a.numpy(), b.numpy()
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B - 2 * sqrtm(A @ B).real)


@pytest.mark.parametrize("width", [2, 17, 64])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_against_scipy(width, shift):
    a, b = features(500, width), features(300, width, shift=shift)
    distance = frechet_distance(FrechetStatistics.of(a), FrechetStatistics.of(b))
    assert distance == pytest.approx(published(a, b), rel=1e-6)


def test_both_covariances_singular():
    """Five dimensions rotated into 64: scipy solves the problem in the five, where it is regular."""
    a, b = features(500, 5), features(300, 5, shift=1.0)
    rotation = torch.linalg.qr(torch.randn(64, 5, dtype=torch.float64)).Q.T
    distance = frechet_distance(FrechetStatistics.of(a @ rotation), FrechetStatistics.of(b @ rotation))
    assert distance == pytest.approx(published(a, b), rel=1e-9)


@pytest.mark.parametrize(("count", "rank"), [(20, 64), (500, 5)], ids=["few samples", "low rank"])
def test_one_covariance_singular(count, rank):
    a, b = features(count, 64, rank), features(300, 64)
    distance = frechet_distance(FrechetStatistics.of(a), FrechetStatistics.of(b))
    assert distance == pytest.approx(published(a, b), rel=1e-6)


def test_orthogonal_supports():
    """tr sqrt(AB) is 0 when the sets vary in orthogonal directions."""
    a, b = torch.zeros(2, 100, 8, dtype=torch.float64)
    a[:, :4], b[:, 4:] = features(100, 4), features(100, 4)
    gold = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
    ours = frechet_distance(FrechetStatistics.of(a), FrechetStatistics.of(b))
    assert ours == pytest.approx(gold.item(), rel=1e-12)


@pytest.mark.parametrize("rank", [3, 48])
def test_identical_sets(rank):
    a = FrechetStatistics.of(features(200, 48, rank))
    assert 0 <= frechet_distance(a, a) < 1e-12 * a.covariance.trace().item()


def test_constant_features():
    a, b = (FrechetStatistics.of(torch.full((5, 3), value)) for value in (1.0, 3.0))
    assert frechet_distance(a, b) == 12.0
    c = FrechetStatistics.of(features(50, 3))
    gold = (c.mean - 1).square().sum() + c.covariance.trace()
    assert frechet_distance(a, c) == pytest.approx(gold.item())


def test_accumulated_in_uneven_batches():
    """A mean a million times the deviations: sums of squares would have lost every digit."""
    x = torch.randn(100, 7, dtype=torch.float64) + 1e6
    batches = x.split([1, 60, 2, 37])
    statistics = FrechetStatistics.accumulate(iter(batches))
    assert statistics.count == 100
    np.testing.assert_allclose(statistics.mean, x.numpy().mean(0), rtol=1e-14)
    gold = np.cov((x - 1e6).numpy(), rowvar=False)
    np.testing.assert_allclose(statistics.covariance, gold, rtol=1e-7, atol=1e-8)


def test_single_precision_features_are_counted_in_double():
    x = torch.randn(50, 7)
    one, same = FrechetStatistics.of(x), FrechetStatistics.of(x.double())
    assert torch.equal(one.scatter, same.scatter)
    assert one.mean.dtype == torch.float64


def test_save_and_load_keep_every_bit(tmp_path):
    statistics = FrechetStatistics.of(features(30, 9))
    statistics.save(tmp_path / "fid.safetensors")
    loaded = FrechetStatistics.load(tmp_path / "fid.safetensors")
    assert torch.equal(loaded.mean, statistics.mean)
    assert torch.equal(loaded.scatter, statistics.scatter)
    assert loaded.count == 30
    assert [path.name for path in tmp_path.iterdir()] == ["fid.safetensors"]


def test_load_refuses_other_files(tmp_path):
    path = tmp_path / "fid.safetensors"
    with pytest.raises(UserError, match="is missing"):
        FrechetStatistics.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"holds \['weight'\], not the \['count', 'mean', 'scatter'\]"):
        FrechetStatistics.load(path)
    mean, scatter = torch.zeros(3, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    save_file({"mean": mean, "scatter": scatter, "count": torch.tensor(5)}, path)
    with pytest.raises(UserError, match=r"mean \(3,\) and scatter \(2, 2\)"):
        FrechetStatistics.load(path)


def test_too_little_data():
    one = FrechetStatistics.of(torch.randn(1, 4))
    with pytest.raises(UserError, match="at least 2 samples, this set has 1"):
        frechet_distance(one, FrechetStatistics.of(torch.randn(9, 4)))
    with pytest.raises(UserError, match="no features"):
        FrechetStatistics.accumulate([])


def test_features_are_checked():
    for shape in [(4,), (0, 4), (2, 4, 4)]:
        with pytest.raises(ValueError, match=r"are not \(N, D\)"):
            FrechetStatistics.of(torch.zeros(shape))
    with pytest.raises(ValueError, match="infinities or NaNs"):
        FrechetStatistics.of(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match="statistics of 3 and 4 features"):
        frechet_distance(FrechetStatistics.of(torch.randn(5, 3)), FrechetStatistics.of(torch.randn(5, 4)))
