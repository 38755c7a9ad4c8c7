"""Frechet distance between two sets of features, the distance behind FID.

    d^2 = |m_a - m_b|^2 + tr A + tr B - 2 tr (A B)^(1/2)

with means m and covariances A, B. With any factors A = F F^T and B = G G^T, the last trace is the sum of the
singular values of F^T G. That is how it is computed: a root of the product itself loses half the digits, and
may fail, when a covariance is singular, as it always is with fewer samples than features.

Shape legend: N samples, D features. Everything is fp64 on the CPU.

Source: FID, arXiv:1706.08500.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import safetensors.torch
import torch
from torch import Tensor

from bilevel_fast.base.errors import UserError
from bilevel_fast.base.files import clip, write_atomic
from bilevel_fast.base.tensors import read_tensors


@dataclass(frozen=True, eq=False)
class FrechetStatistics:
    """Mean and covariance of a set of feature vectors, mergeable with those of another set."""

    mean: Tensor  # (D,) fp64
    scatter: Tensor  # (D, D) fp64, sum of outer products of deviations from the mean
    count: int

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Statistics of one batch. Of fewer samples than features, the deviations are a factor of the covariance.

        Args:
            features: (N, D), N >= 1, any float dtype and device.

        Raises:
            ValueError: The shape is another, or a feature is not finite.
        """
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(f"features {tuple(features.shape)} are not (N, D) with N, D >= 1")
        features = features.detach().to("cpu", torch.float64)
        if not features.isfinite().all():
            raise ValueError(f"features {tuple(features.shape)} hold infinities or NaNs")
        mean = features.mean(0)
        deviations = features - mean
        found = cls(mean, deviations.T @ deviations, len(features))
        if 1 < len(features) < features.shape[1]:
            found.__dict__["factor"] = deviations.T / (len(features) - 1) ** 0.5
        return found

    @classmethod
    def accumulate(cls, batches: Iterable[Tensor]) -> Self:
        """Statistics of all batches together, holding one at a time.

        Raises:
            UserError: There are no batches.
        """
        total = None
        for batch in batches:
            part = cls.of(batch)
            total = total.merge(part) if total else part
        if total is None:
            raise UserError("there are no features to compute Frechet statistics of")
        return total

    def merge(self, other: Self) -> Self:
        """Statistics of the union of two sets (Chan, Golub and LeVeque 1979: no cancellation)."""
        _check_width(self, other)
        count = self.count + other.count
        shift = other.mean - self.mean
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        mean = self.mean + shift * (other.count / count)
        return replace(self, mean=mean, scatter=self.scatter + other.scatter + between, count=count)

    @property
    def covariance(self) -> Tensor:
        """(D, D) fp64, the unbiased estimate.

        Raises:
            UserError: There are fewer than two samples.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 samples, this set has {self.count}")
        return self.scatter / (self.count - 1)

    @cached_property
    def factor(self) -> Tensor:
        """F (D, R) fp64 with F F^T the covariance: computed once, as the other side of many distances.

        Raises:
            UserError: There are fewer than two samples.
        """
        return _factor(self.covariance)

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write a safetensors file, whole or not at all; `metadata` says what the features are."""
        tensors = {"mean": self.mean, "scatter": self.scatter, "count": torch.tensor(self.count)}
        write_atomic(path, safetensors.torch.save(tensors, metadata))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UserError: The file is missing, damaged, or holds something else.
        """
        tensors, wanted = read_tensors(path), {"mean", "scatter", "count"}
        if set(tensors) != wanted:
            raise UserError(f"{path} holds {clip(sorted(tensors))}, not the {sorted(wanted)} of Frechet statistics")
        mean, scatter, count = (tensors[name].clone() for name in ("mean", "scatter", "count"))
        if mean.ndim != 1 or scatter.shape != mean.shape * 2 or count.numel() != 1:
            raise UserError(f"{path}: mean {tuple(mean.shape)} and scatter {tuple(scatter.shape)} do not fit")
        if not (mean.is_floating_point() and scatter.is_floating_point() and count.dtype == torch.int64 and count > 0):
            raise UserError(f"{path}: wanted mean and scatter of floats, and a count of images that is positive")
        return cls(mean.double(), scatter.double(), int(count))


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of a set whose size is not known, as statistics files of others hold them."""

    mean: Tensor  # (D,) fp64
    covariance: Tensor  # (D, D) fp64

    @cached_property
    def factor(self) -> Tensor:
        """F (D, R) fp64 with F F^T the covariance."""
        return _factor(self.covariance)


def frechet_distance(a: FrechetStatistics | Moments, b: FrechetStatistics | Moments) -> float:
    """The squared Frechet distance of two Gaussians with these statistics, in squared units of the features.

    Raises:
        UserError: A set has fewer than two samples.
        ValueError: The sets differ in the number of features.
    """
    _check_width(a, b)
    cross = torch.linalg.svdvals(a.factor.T @ b.factor).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, distance.item())  # round-off of equal sets may fall below zero


def resampled_distances(
    features: Tensor, reference: FrechetStatistics | Moments, counts: Iterable[Tensor]
) -> Iterator[float]:
    """Distances of resamples of one set to a fixed reference, each for a product and the eigenvalues of a matrix.

    With B = G G^T, sample i in the draw w_i times, and deviations c_i from the draw's mean, the last trace is the sum
    of the roots of the eigenvalues of G^T A G = sum_i w_i (G^T c_i) (G^T c_i)^T / (N - 1), and G^T f_i is known.
    Roots of eigenvalues have half the digits, which is plenty for the spread of draws.

    Args:
        features: (N, D), N >= 2.
        reference: Of D features.
        counts: (N,) integers each, which sum to N: how often each sample is in the draw.
    """
    x = features.double()
    z = x @ reference.factor
    for w in counts:
        kept = w > 0
        weights, total = w[kept].double(), int(w.sum())
        mean, projected = weights @ x[kept] / total, weights @ z[kept] / total
        root = (weights / (total - 1)).sqrt()[:, None]
        trace = ((x[kept] - mean) * root).square().sum()
        rows = (z[kept] - projected) * root
        gram = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
        cross = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        yield ((mean - reference.mean).square().sum() + trace + reference.covariance.trace() - 2 * cross).item()


def _factor(covariance: Tensor) -> Tensor:
    """F (D, R) with F F^T = covariance (D, D) of rank R."""
    values, vectors = torch.linalg.eigh(covariance)
    # eigenvalues below the error of eigh are zeros; their roots would enter at the root of that error
    floor = values[-1] * len(values) * torch.finfo(values.dtype).eps
    kept = values > floor
    return vectors[:, kept] * values[kept].sqrt()


def _check_width(a: FrechetStatistics | Moments, b: FrechetStatistics | Moments) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {len(a.mean)} and {len(b.mean)} features cannot be compared")
