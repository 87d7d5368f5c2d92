"""Mean, covariance and PCA of vectors that come in pieces, in memory that does not grow with their number.

The covariance is kept as a factor F of few rows, F^T F = sum of (x - mean)(x - mean)^T, never as a d x d matrix.
Pieces are joined exactly (Chan, Golub, LeVeque 1979, for the mean; one more row for the factor, as in incremental PCA,
Ross et al. 2008); only when more than ``rank`` rows have come are the smallest principal axes dropped.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from replib.clouds import Cloud
from replib.core.errors import ReplibError


class Moments:
    """Running moments of ``[layers, n, dim]`` pieces; each layer by itself, in float64.

    Args:
        rank: rows of the covariance factor. Exact while no more vectors than that have come, or from the width of the
            model on; below it ``lost`` says how much was dropped. 0 keeps the mean and the total variance alone.
    """

    def __init__(self, rank: int = 0):
        self.rank, self.n = rank, 0
        self._mean: Tensor = torch.zeros(0)
        self._factor: Tensor = torch.zeros(0)
        self._total: Tensor = torch.zeros(0)

    def update(self, values: Float[Tensor, "layers n dim"]) -> Moments:
        """Take in more vectors."""
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

    def cloud(self, index: int) -> Cloud:
        """Gaussian of one layer by index, for ``GaussianMap.fit`` and ``bures_wasserstein`` (less what is ``lost``)."""
        return Cloud(self.mean[index], self.factor[index], self.n)

    @property
    def lost(self) -> Float[Tensor, " layers"]:
        """Share of the total variance that ``factor`` does not hold."""
        held = self.factor.square().sum((1, 2))
        return (1 - held / self.variance.clamp(min=1e-300)).clamp(min=0)

    def pca(self, k: int) -> tuple[Float[Tensor, "layers k dim"], Float[Tensor, "layers k"]]:
        """The k principal axes, each of unit length with its largest coordinate positive, and their variances.

        Raises ReplibError if fewer axes are held.
        """
        rows = self.factor
        if k > rows.shape[1]:
            raise ReplibError(f"{k} axes were asked for, but only {rows.shape[1]} are held: raise rank, or lower k.")
        length = rows[:, :k].norm(dim=-1)
        axes = rows[:, :k] / length.clamp(min=1e-300)[..., None]
        signs = axes.gather(-1, axes.abs().argmax(-1, keepdim=True)).sign()
        return axes * signs, length.square()

    def _checked(self, least: int, value: Tensor) -> Tensor:
        if self.n < least:
            raise ReplibError(f"Moments of {self.n} vectors are not defined: update() with at least {least} first.")
        return value


def _shortened(rows: Float[Tensor, "layers n dim"], rank: int) -> Float[Tensor, "layers r dim"]:
    """Rotated so that row i lies along principal axis i, and cut: F^T F changes by what is cut alone."""
    gram = rows @ rows.mT if rows.shape[1] <= rows.shape[2] else rows.mT @ rows
    _, axes = torch.linalg.eigh(gram)
    kept = axes.flip(-1)[..., :rank]
    if rows.shape[1] <= rows.shape[2]:
        return kept.mT @ rows
    return (rows @ kept).norm(dim=1)[..., None] * kept.mT
