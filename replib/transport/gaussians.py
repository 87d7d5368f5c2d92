"""Samples of activations, their Gaussians, principal axes and running moments; float64 on the CPU.

A covariance is held as a factor ``F``, ``Sigma = F^T F``, and never as a ``dim x dim`` matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from replib.core.errors import ReplibError, check_choice

Samples: TypeAlias = Tensor | np.ndarray


def as_samples(values: Samples, name: str) -> Float[Tensor, "n d"]:
    """Convert activations of one class to a float64 matrix on the CPU; ReplibError unless finite and not empty."""
    rows = torch.as_tensor(values).detach().to("cpu", torch.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ReplibError(f"{name} has shape {tuple(rows.shape)}; it must be [prompts, dim], not empty.")
    bad = (~rows.isfinite()).any(1)
    if bad.any():
        raise ReplibError(
            f"{name} has NaN or inf in {int(bad.sum())} of {len(rows)} rows, first {int(bad.nonzero()[0])}; "
            "capture in float32 or bfloat16 (float16 overflows), or leave those prompts out."
        )
    return rows


def sample_pair(source: Samples, target: Samples) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Both classes by ``as_samples``; ReplibError unless of one width."""
    first, second = as_samples(source, "first class"), as_samples(target, "second class")
    _check_widths(first.shape[1], second.shape[1])
    return first, second


def span_coordinates(x: Samples, y: Samples) -> tuple[Float[Tensor, "n r"], Float[Tensor, "m r"]]:
    """The two samples in an orthonormal basis of their pooled span, pooled mean at the origin.

    An isometry onto ``min(d, n + m)`` coordinates: distances, mean gaps and spectra are the same.
    """
    x, y = sample_pair(x, y)
    rows = torch.cat([x, y])
    rows = rows - rows.mean(0)
    if rows.shape[1] > rows.shape[0]:
        rows = torch.linalg.qr(rows.mT, mode="r")[1].mT
    return rows[: len(x)], rows[len(x) :]


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of one class of activations."""

    mean: Float[Tensor, " d"]
    factor: Float[Tensor, "r d"]
    """``F`` with ``F^T F`` the covariance about this mean, divided by n - 1."""
    n: int
    """Number of samples."""
    sampled: bool = False
    """Whether row i of the factor is sample i, centred; streamed moments hold no samples."""

    def __post_init__(self) -> None:
        if not (self.mean.isfinite().all() and self.factor.isfinite().all()):
            raise ReplibError(
                "a Gaussian's mean or covariance is NaN or inf; leave out the vectors that are not finite."
            )

    @classmethod
    def of(cls, x: Samples | Gaussian, name: str = "sample") -> Gaussian:
        """The Gaussian of samples ``[n, d]``; ReplibError if they are fewer than two or not finite."""
        if isinstance(x, Gaussian):
            return x
        rows = as_samples(x, name)
        if len(rows) < 2:
            raise ReplibError("one sample has no covariance; give at least two prompts a class.")
        mean = rows.mean(0)
        return cls(mean, (rows - mean) / math.sqrt(len(rows) - 1), len(rows), sampled=True)

    @property
    def variance(self) -> float:
        """Mean variance of a coordinate, ``tr Sigma / d``."""
        return float(self.factor.square().sum()) / len(self.mean)

    def samples(self, purpose: str) -> Float[Tensor, "n d"]:
        """The samples about their mean; ReplibError, naming the purpose, if there are none."""
        if not self.sampled:
            raise ReplibError(f"{purpose} needs the samples themselves; streamed moments hold none, so capture them.")
        return self.factor * math.sqrt(self.n - 1)

    def onto(self, axes: Float[Tensor, "d k"]) -> Gaussian:
        """The Gaussian in the coordinates of some axes."""
        return Gaussian(self.mean @ axes, self.factor @ axes, self.n, self.sampled)


def cloud_pair(x: Samples | Gaussian, y: Samples | Gaussian) -> tuple[Gaussian, Gaussian]:
    """Both classes by ``Gaussian.of``; ReplibError unless of one width."""
    source, target = Gaussian.of(x, "first class"), Gaussian.of(y, "second class")
    _check_widths(len(source.mean), len(target.mean))
    return source, target


def principal_axes(
    rows: Float[Tensor, "n d"], k: int | None = None
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " r"]]:
    """Leading axes of centred rows, and the sum of squares along every axis, largest first; ``k=None``: all.

    Eigenvectors of the smaller of ``Z Z^T`` and ``Z^T Z``, re-orthonormalised once, signed by ``_oriented``.
    ReplibError if the rows have fewer than k axes.
    """
    wide = rows.shape[1] > rows.shape[0]
    energy, vectors = torch.linalg.eigh(rows @ rows.mT if wide else rows.mT @ rows)
    energy, vectors = energy.flip(0).clamp_min(0), vectors.flip(1)
    rank = int((energy > max(rows.shape) * torch.finfo(rows.dtype).eps * energy[0]).sum())
    k = rank if k is None else k
    if k > rank:
        raise ReplibError(f"{k} axes asked of samples of rank {rank}; lower k, or add prompts that differ.")
    axes = rows.mT @ (vectors[:, :k] / energy[:k].sqrt()) if wide else vectors[:, :k]
    return _oriented(torch.linalg.qr(axes)[0]), energy


def _oriented(axes: Float[Tensor, "..."], dim: int = 0) -> Float[Tensor, "..."]:
    """Axes along ``dim``, each with its coordinate of largest magnitude positive, whatever row order or library."""
    return axes * axes.gather(dim, axes.abs().argmax(dim, keepdim=True)).sign()


def _check_widths(first: int, second: int) -> None:
    if first != second:
        raise ReplibError(f"the classes have widths {first} and {second}; capture both at one site.")


RULES = ("ledoit_wolf", "oas")


def shrinkage(x: Samples | Gaussian, *, rule: str = "ledoit_wolf") -> float:
    """Weight ``s`` of the identity in the shrunk covariance ``(1 - s) S + s tr(S)/d I``, in [0, 1].

    Ledoit and Wolf (2004, "A well-conditioned estimator", Lemma 3.2 to 3.4) by scikit-learn, or OAS (Chen et al. 2010,
    eq. 23) from the ``n x n`` Gram matrix, which never forms ``S``, divided by n. Near 1, n samples hardly determine
    the covariance in d axes. ReplibError on another rule, or Ledoit-Wolf of a streamed cloud.
    """
    cloud = Gaussian.of(x)
    n, d = cloud.n, len(cloud.mean)
    check_choice("rule", rule, RULES)
    if rule == "ledoit_wolf":
        rows = cloud.samples("Ledoit-Wolf shrinkage")
        return float(ledoit_wolf_shrinkage(rows.numpy(), assume_centered=True)) if rows.any() else 1.0
    gram = cloud.factor @ cloud.factor.mT * (n - 1) / n
    mu, alpha = float(gram.trace()) / d, float(gram.square().sum()) / d**2
    spread = (n + 1) * (alpha - mu**2 / d)
    return min(1.0, (alpha + mu**2) / spread) if spread > 0 else 1.0


class Shrunk(NamedTuple):
    """The covariance ``(1 - weight) S + floor I``."""

    weight: float
    floor: float

    def factor(self, factor: Float[Tensor, "r k"]) -> Float[Tensor, "q k"]:
        """A factor of it, from one of S."""
        identity = torch.eye(factor.shape[1], dtype=factor.dtype)
        return torch.cat([math.sqrt(1 - self.weight) * factor, math.sqrt(self.floor) * identity])


def shrunk_pair(source: Gaussian, target: Gaussian, ridge: float | str) -> tuple[Shrunk, Shrunk]:
    """Shrinkage of both covariances: by one share of their mean variance, or each by a rule."""
    if isinstance(ridge, str):
        weights = shrinkage(source, rule=ridge), shrinkage(target, rule=ridge)
        return Shrunk(weights[0], weights[0] * source.variance), Shrunk(weights[1], weights[1] * target.variance)
    floor = ridge * (source.variance + target.variance) / 2
    return Shrunk(0.0, floor), Shrunk(0.0, floor)


class Moments:
    """Running moments of ``[layers, n, dim]`` pieces; each layer by itself, in float64.

    Args:
        rank: rows of the covariance factor. Exact for up to ``rank`` vectors, or where ``rank`` reaches the width of
            the model; otherwise ``lost`` is the share dropped. 0 keeps the mean and the total variance alone.
    """

    def __init__(self, rank: int = 0):
        self.rank, self.n = rank, 0
        self._mean: Tensor = torch.zeros(0)
        self._factor: Tensor = torch.zeros(0)
        self._total: Tensor = torch.zeros(0)

    def update(self, values: Float[Tensor, "layers n dim"]) -> Moments:
        """Add vectors."""
        layers, _, dim = values.shape
        if self.n == 0:
            self._mean, self._total = torch.zeros(layers, dim).double(), torch.zeros(layers).double()
            self._factor = torch.zeros(layers, 0, dim).double()
        if (layers, dim) != self._mean.shape:
            had = tuple(self._mean.shape)
            raise ReplibError(f"A piece of {layers} layers and width {dim}, after pieces of {had}: one model only.")
        for piece in values.double().split(max(self.rank, 128), dim=1):  # short pieces: cost grows with their square
            self._join(piece)
        return self

    def _join(self, x: Float[Tensor, "layers n dim"]) -> None:
        m, mean = x.shape[1], x.mean(dim=1)
        centred, gap = x - mean[:, None], mean - self._mean
        between = gap[:, None] * (self.n * m / (self.n + m)) ** 0.5
        self._total = self._total + centred.square().sum((1, 2)) + between.square().sum((1, 2))
        self._mean = self._mean + gap * (m / (self.n + m))
        if self.rank:
            self._factor = _shortened(torch.cat([self._factor, centred, between], dim=1), self.rank)
        self.n += m

    @property
    def mean(self) -> Float[Tensor, "layers dim"]:
        """Mean of all vectors."""
        return self._checked(1, self._mean)

    @property
    def variance(self) -> Float[Tensor, " layers"]:
        """Total variance, the trace of the covariance (divided by n - 1): exact at any rank."""
        return self._checked(2, self._total) / (self.n - 1)

    @property
    def factor(self) -> Float[Tensor, "layers rank dim"]:
        """F with F^T F the covariance (divided by n - 1), of at most ``rank`` rows, largest axis first."""
        if not self.rank:
            raise ReplibError("These moments hold no covariance: make them with Moments(rank=…).")
        return self._checked(2, self._factor) / (self.n - 1) ** 0.5

    def gaussian(self, index: int) -> Gaussian:
        """Gaussian of one layer by index, for ``GaussianMap.fit`` or ``bures_wasserstein``, less ``lost``."""
        return Gaussian(self.mean[index], self.factor[index], self.n)

    @property
    def lost(self) -> Float[Tensor, " layers"]:
        """Share of the total variance outside ``factor``."""
        held = self.factor.square().sum((1, 2))
        return (1 - held / self.variance.clamp(min=1e-300)).clamp(min=0)

    def pca(self, k: int) -> tuple[Float[Tensor, "layers k dim"], Float[Tensor, "layers k"]]:
        """The k principal axes, each of unit length with its largest coordinate positive, and their variances.

        Raises ReplibError if fewer axes are held.
        """
        rows = self.factor
        if k > rows.shape[1]:
            raise ReplibError(f"{k} axes exceed the {rows.shape[1]} held: raise rank, or lower k.")
        length = rows[:, :k].norm(dim=-1)
        axes = rows[:, :k] / length.clamp(min=1e-300)[..., None]
        return _oriented(axes, dim=-1), length.square()

    def _checked(self, least: int, value: Tensor) -> Tensor:
        if self.n < least:
            raise ReplibError(f"Moments of {self.n} vectors are not defined: update() with at least {least} first.")
        return value


def _shortened(rows: Float[Tensor, "layers n dim"], rank: int) -> Float[Tensor, "layers r dim"]:
    """Rotate rows onto principal axes and keep the first ``rank``; F^T F loses the dropped axes alone."""
    gram = rows @ rows.mT if rows.shape[1] <= rows.shape[2] else rows.mT @ rows
    _, axes = torch.linalg.eigh(gram)
    leading = axes.flip(-1)[..., :rank]
    if rows.shape[1] <= rows.shape[2]:
        return leading.mT @ rows
    return (rows @ leading).norm(dim=1)[..., None] * leading.mT
