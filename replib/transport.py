"""Closed-form optimal transport between two Gaussian clouds of activations.

The map carries harmful activations onto harmless ones inside a few pooled principal axes and leaves the rest
of the space alone (PCA-OT, arXiv 2603.04355). Every quantity is computed from factors ``F`` of the
covariances, ``Sigma = F^T F``, never from the covariances themselves: an SVD of factors does not square the
condition number, gives positive semi-definite results by construction and never builds a ``dim x dim``
matrix. Statistics are float64 on the CPU, whatever comes in.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from replib.errors import ReplibError

Samples = Tensor | np.ndarray


def as_samples(values: Samples, name: str) -> Float[Tensor, "n d"]:
    """Activations of one class as a float64 matrix on the CPU; ReplibError unless finite and not empty."""
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
    pair = as_samples(source, "first class"), as_samples(target, "second class")
    widths = [rows.shape[1] for rows in pair]
    if widths[0] != widths[1]:
        raise ReplibError(f"the classes have widths {widths[0]} and {widths[1]}; capture both at one site.")
    return pair


def principal_axes(
    rows: Float[Tensor, "n d"], k: int | None = None
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " r"]]:
    """Leading axes of centred rows, and the sum of squares along every axis, largest first; ``k=None``: all.

    Eigenvectors of the smaller of ``Z Z^T`` and ``Z^T Z``, re-orthonormalised once. The coordinate of largest
    magnitude of each axis is positive: signs depend neither on the order of the rows nor on a library.
    """
    wide = rows.shape[1] > rows.shape[0]
    energy, vectors = torch.linalg.eigh(rows @ rows.mT if wide else rows.mT @ rows)
    energy, vectors = energy.flip(0).clamp_min(0), vectors.flip(1)
    rank = int((energy > max(rows.shape) * torch.finfo(rows.dtype).eps * energy[0]).sum())
    k = rank if k is None else k
    if k > rank:
        raise ReplibError(f"{k} axes asked of samples of rank {rank}; lower k, or add prompts that differ.")
    axes = rows.mT @ (vectors[:, :k] / energy[:k].sqrt()) if wide else vectors[:, :k]
    axes = torch.linalg.qr(axes)[0]
    return axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign(), energy


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


def monge_scale(source: Float[Tensor, "n k"], target: Float[Tensor, "m k"]) -> Float[Tensor, "k k"]:
    """The symmetric positive ``A`` with ``A Sigma_s A = Sigma_t``, from factors ``F`` with ``Sigma = F^T F``.

    ``R = qr(F)``, ``R_t R_s^T = V S W^T``, ``B = R_s^-1 W S^(1/2)``, ``A = B B^T``: accurate where the
    textbook ``Sigma_s^(-1/2) (...)^(1/2) Sigma_s^(-1/2)`` has lost every digit. Keeps the dtype.
    ReplibError if ``Sigma_s`` is singular.
    """
    upper_source, upper_target = (torch.linalg.qr(factor, mode="r")[1] for factor in (source, target))
    noise = max(source.shape) * torch.finfo(source.dtype).eps * upper_source.norm()
    if len(upper_source) < source.shape[1] or upper_source.diagonal().abs().min() <= noise:
        raise ReplibError("the source does not vary along some axis of the basis; set ridge > 0 or lower k.")
    _, singular, right = torch.linalg.svd(upper_target @ upper_source.mT)
    root = torch.linalg.solve_triangular(upper_source, right.mT, upper=True) * singular.sqrt()
    return root @ root.mT


@dataclass(frozen=True)
class GaussianMap:
    """Optimal transport of one Gaussian onto another inside a subspace: call it on activations ``[..., d]``.

    ``T(x) = x + P[(A - I)(P^T x - m_s) + (m_t - m_s)]``.
    """

    basis: Float[Tensor, "d k"]
    """``P``, orthonormal columns."""
    scale: Float[Tensor, "k k"]
    """``A``, symmetric positive definite."""
    source_mean: Float[Tensor, " k"]
    """``m_s``, mean of the source in the basis."""
    target_mean: Float[Tensor, " k"]
    """``m_t``, mean of the target there."""
    rest: Float[Tensor, " d"]
    """Mean of the target outside the basis; where the complement goes when it is not kept."""
    kept: float
    """Share of the complement that is kept: 1 keeps it all, 0 replaces it by ``rest``."""
    rho: float
    """Share of the squared mean gap that lies inside the basis, in [0, 1]."""
    cost: float
    """Mean squared displacement of the source: ``W2^2`` inside the basis where the complement is kept."""

    @classmethod
    def fit(
        cls,
        source: Samples,
        target: Samples,
        *,
        k: int | None = 2,
        basis: str = "pooled_pca",
        complement: str = "keep",
        ridge: float = 1e-6,
    ) -> GaussianMap:
        """Fit the map that carries ``source`` (harmful, ``[n, d]``) to ``target`` (harmless, ``[m, d]``).

        Args:
            source: activations to be moved, torch or numpy, any float dtype.
            target: activations whose mean and covariance they take on.
            k: axes of the basis. None takes the whole pooled span: the full-space ridge map, which is the
                identity off the span. Take ``ridge`` near 1 then, as n prompts cannot show d variances.
            basis: ``pooled_pca`` are the principal axes of both classes together, between-class term
                included; ``mean_first`` is the mean gap and then principal axes of what is left, for models
                whose few massive coordinates hide the gap from the PCA.
            complement: ``keep`` leaves what is outside the basis alone, ``drop`` sets it to its target mean.
            ridge: added to both covariances, as a share of their mean variance per axis.

        Warns when the basis holds less than half of the squared mean gap. ReplibError on unusable samples.
        """
        source, target = sample_pair(source, target)
        _check_options(min(len(source), len(target)), k, (basis, complement), ridge)
        axes = _BASES[basis](source, target, k)
        scale = _ridged_scale(source @ axes, target @ axes, ridge)
        target_mean = target.mean(0) @ axes
        fitted = cls(
            basis=axes,
            scale=scale,
            source_mean=source.mean(0) @ axes,
            target_mean=target_mean,
            rest=target.mean(0) - axes @ target_mean,
            kept=float(complement == "keep"),
            rho=_energy_inside(axes, target.mean(0) - source.mean(0)),
            cost=math.nan,
        )
        moved = fitted(source) - source
        return replace(fitted, cost=float(moved.mean(0).square().sum() + moved.var(0).sum()))

    @property
    def condition(self) -> float:
        """Condition number of ``scale``; large values say that some axis is stretched on thin evidence."""
        return float(torch.linalg.cond(self.scale))

    def __call__(self, x: Samples) -> Float[Tensor, "*batch d"]:
        """``T(x)`` for activations ``[..., d]``, computed in float32 or better and cast back."""
        x = torch.as_tensor(x)
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        parts = self.basis, self._gain(), self.source_mean, self.target_mean - self.source_mean, self.rest
        axes, gain, source_mean, shift, rest = (part.to(work) for part in parts)
        inside = work @ axes
        moved = work + ((inside - source_mean) @ gain + shift) @ axes.mT
        if self.kept < 1:
            moved = moved - (1 - self.kept) * (work - inside @ axes.mT - rest)
        return moved.to(x.dtype)

    def at(self, strength: float) -> GaussianMap:
        """McCann's displacement interpolation ``(1 - s) x + s T(x)``, at ``s^2`` times the cost.

        ``at(0)`` is the identity to the bit, ``at(a).at(b)`` is ``at(a * b)``.
        """
        if not 0 <= strength <= 1:
            raise ReplibError(f"strength is {strength}; it runs from 0 (identity) to 1 (the whole map).")
        return replace(
            self,
            scale=torch.eye(len(self.scale), dtype=self.scale.dtype) + strength * self._gain(),
            target_mean=self.source_mean + strength * (self.target_mean - self.source_mean),
            kept=1 - strength * (1 - self.kept),
            cost=strength**2 * self.cost,
        )

    def factors(self) -> tuple[Float[Tensor, "d k"], Float[Tensor, "d k"], Float[Tensor, " d"]]:
        """``(u, v, c)`` with ``T(x) = x + u (v^T x) + c``, the form in which an edit holds the map."""
        if self.kept < 1:
            raise ReplibError("a map that drops the complement is not low-rank; call it, or fit with 'keep'.")
        shift = self.target_mean - self.source_mean - self._gain() @ self.source_mean
        return self.basis @ self._gain(), self.basis, self.basis @ shift

    def _gain(self) -> Float[Tensor, "k k"]:
        return self.scale - torch.eye(len(self.scale), dtype=self.scale.dtype)


class BuresWasserstein(NamedTuple):
    """Squared 2-Wasserstein distance between two Gaussians, by part."""

    mean: float
    covariance: float
    total: float


def bures_wasserstein(x: Samples, y: Samples) -> BuresWasserstein:
    """Squared Bures-Wasserstein distance of the Gaussians with the samples' means and (n - 1) covariances.

    ``|m_x - m_y|^2 + min over orthogonal Q of |F_x - Q F_y|^2``, the Procrustes form: never negative, and
    exact for near-equal clouds where the trace form cancels. Biased upwards when n is not much larger than
    d, see ``bures_wasserstein_debiased``.
    """
    x, y = sample_pair(x, y)
    mean = float((x.mean(0) - y.mean(0)).square().sum())
    covariance = _squared_bures(_factor(x), _factor(y))
    return BuresWasserstein(mean, covariance, mean + covariance)


def bures_wasserstein_debiased(x: Samples, y: Samples, *, splits: int = 8, seed: int = 0) -> BuresWasserstein:
    """Squared Bures-Wasserstein distance less what finite samples add to it; may fall below zero.

    The mean part loses ``tr S_x / n_x + tr S_y / n_y``. The covariance part is the distance between classes
    less the distance within them, ``(B(X1,Y1) + B(X2,Y2) - B(X1,X2) - B(Y1,Y2)) / 2``, all four on halves of
    equal size, averaged over random halvings.
    """
    x, y = span_coordinates(x, y)
    half = min(len(x), len(y)) // 2
    if half < 2 or splits < 1:
        raise ReplibError(f"{len(x)} and {len(y)} samples, {splits} splits; needs 4 a class and 1 split.")
    generator = torch.Generator().manual_seed(seed)
    covariance = sum(_split_difference(x, y, half, generator) for _ in range(splits)) / splits
    noise = sum(float(rows.var(0).sum()) / len(rows) for rows in (x, y))
    mean = float((x.mean(0) - y.mean(0)).square().sum()) - noise
    return BuresWasserstein(mean, covariance, mean + covariance)


def shrinkage(x: Samples, *, rule: str = "ledoit_wolf") -> float:
    """Weight ``s`` of the identity in the shrunk covariance ``(1 - s) S + s tr(S)/d I``.

    Ledoit and Wolf (2004) or OAS (Chen et al. 2010), from the Gram matrix; ``S`` divides by n.
    Near 1 it says that n samples know next to nothing of the covariance in d axes.
    """
    rows = as_samples(x, "sample")
    n, d = rows.shape
    rows = rows - rows.mean(0)
    gram = rows @ rows.mT
    mu = float(gram.trace()) / (n * d)
    energy = float(gram.square().sum()) / n**2
    if rule == "oas":
        alpha = energy / d**2
        excess, spread = (alpha + mu**2), (n + 1) * (alpha - mu**2 / d)
    elif rule == "ledoit_wolf":
        excess = (float(gram.diagonal().square().sum()) / n - energy) / (n * d)
        spread = energy / d - mu**2
    else:
        raise ReplibError(f"shrinkage rule is {rule!r}; choose 'ledoit_wolf' or 'oas'.")
    return min(1.0, excess / spread) if spread > 0 else 1.0


def _check_options(smallest: int, k: int | None, choices: tuple[str, str], ridge: float) -> None:
    for choice, allowed in zip(choices, (tuple(_BASES), ("keep", "drop")), strict=True):
        if choice not in allowed:
            raise ReplibError(f"{choice!r} is not known here; choose from {allowed}.")
    if k is not None and k < 1:
        raise ReplibError(f"k is {k}; the basis needs at least one axis.")
    if smallest <= (1 if k is None else k):
        raise ReplibError(f"{smallest} prompts in a class cannot fit {k} axes; add prompts or lower k.")
    if not 0 <= ridge < math.inf:
        raise ReplibError(f"ridge is {ridge}; it is a share of the mean variance, 1e-6 for small k.")


def _pooled_pca(source: Tensor, target: Tensor, k: int | None) -> Tensor:
    rows = torch.cat([source, target])
    return principal_axes(rows - rows.mean(0), k)[0]


def _mean_first(source: Tensor, target: Tensor, k: int | None) -> Tensor:
    gap = target.mean(0) - source.mean(0)
    if not gap.any():
        raise ReplibError("the classes have one mean, 'mean_first' has no first axis; use 'pooled_pca'.")
    first = (gap / gap.norm())[:, None]
    rows = torch.cat([source, target])
    rows = rows - rows.mean(0)
    rest = principal_axes(rows - rows @ first @ first.mT, None if k is None else k - 1)[0]
    return torch.cat([first, rest], dim=1)


_BASES = {"pooled_pca": _pooled_pca, "mean_first": _mean_first}


def _ridged_scale(source: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Scale between the covariances plus ``ridge`` times their mean variance, as rows of the factors."""
    k = source.shape[1]
    factors = [_factor(rows) for rows in (source, target)]
    variance = sum(float(factor.square().sum()) for factor in factors) / (2 * k)
    rounding = torch.finfo(source.dtype).eps * float(torch.cat([source, target]).abs().max())
    if variance <= rounding**2:
        raise ReplibError("neither class varies along the basis, there is no covariance to fit; add prompts.")
    rows = math.sqrt(ridge * variance) * torch.eye(k, dtype=source.dtype)
    return monge_scale(*(torch.cat([factor, rows]) for factor in factors))


def _energy_inside(axes: Tensor, gap: Tensor) -> float:
    total = float(gap.square().sum())
    rho = float((gap @ axes).square().sum()) / total if total > 0 else 1.0
    if rho < 0.5:
        warnings.warn(
            f"the basis holds {rho:.0%} of the squared mean gap, so the map barely moves the means; "
            "raise k or use basis='mean_first'.",
            stacklevel=3,
        )
    return rho


def _factor(rows: Float[Tensor, "n d"]) -> Float[Tensor, "r d"]:
    """``F`` with ``F^T F`` the covariance of the rows about their own mean, divided by n - 1."""
    if len(rows) < 2:
        raise ReplibError("one sample has no covariance; give at least two prompts a class.")
    centred = (rows - rows.mean(0)) / math.sqrt(len(rows) - 1)
    return torch.linalg.qr(centred, mode="r")[1] if len(rows) > rows.shape[1] else centred


def _squared_bures(source: Tensor, target: Tensor) -> float:
    size = max(len(source), len(target))
    source, target = (torch.cat([f, f.new_zeros(size - len(f), f.shape[1])]) for f in (source, target))
    left, _, right = torch.linalg.svd(target @ source.mT)
    return float((source - right.mT @ (left.mT @ target)).square().sum())


def _split_difference(x: Tensor, y: Tensor, half: int, generator: torch.Generator) -> float:
    x1, x2, y1, y2 = (
        _factor(rows[part])
        for rows in (x, y)
        for part in torch.randperm(len(rows), generator=generator)[: 2 * half].split(half)
    )
    between = _squared_bures(x1, y1) + _squared_bures(x2, y2)
    return (between - _squared_bures(x1, x2) - _squared_bures(y1, y2)) / 2
