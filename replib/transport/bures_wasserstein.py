"""Squared Bures-Wasserstein distances of two clouds: plain, freed of their bias, and beside what chance gives.

With fewer samples than dimensions nearly all of the plain covariance part is bias: read the debiased distance, and the
null of relabelled samples beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError
from replib.transport.gaussians import Gaussian, Samples, cloud_pair, span_coordinates


class BuresWasserstein(NamedTuple):
    """Squared 2-Wasserstein distance between two Gaussians, by part (or p-values of these)."""

    mean: float
    covariance: float
    total: float


@dataclass(frozen=True)
class BuresNull:
    """Plain distance of two samples, and its distribution under random relabelling."""

    value: BuresWasserstein
    centre: BuresWasserstein
    """Mean over relabellings: the bias. ``value`` less this is comparable to the debiased distance."""
    low: BuresWasserstein
    """2.5 % points over relabellings."""
    high: BuresWasserstein
    """97.5 % points."""
    p_value: BuresWasserstein
    """Share of labellings, the true one among them, that reach the true one's value."""


def bures_wasserstein(x: Samples | Gaussian, y: Samples | Gaussian) -> BuresWasserstein:
    """Squared Bures-Wasserstein distance of the Gaussians with the samples' means and (n - 1) covariances.

    ``|m_x - m_y|^2 + min over orthogonal Q of |F_x - Q F_y|^2``, the Procrustes form: never negative, and
    exact for near-equal clouds where the trace form cancels. Biased upwards when n is not much larger than
    d, see ``bures_wasserstein_debiased``.
    """
    a, b = cloud_pair(x, y)
    mean = float((a.mean - b.mean).square().sum())
    covariance = _squared_bures(a.factor, b.factor)
    return BuresWasserstein(mean, covariance, mean + covariance)


def bures_wasserstein_debiased(x: Samples, y: Samples, *, splits: int = 8, seed: int = 0) -> BuresWasserstein:
    """Squared Bures-Wasserstein distance less what finite samples add to it; may fall below zero.

    The mean part loses ``tr S_x / n_x + tr S_y / n_y``. The covariance part is the distance between classes
    less the distance within them, ``(B(X1,Y1) + B(X2,Y2) - B(X1,X2) - B(Y1,Y2)) / 2``, all four on halves of
    equal size, averaged over random halvings. An estimator of ours; no paper is known to use it.
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


def bures_wasserstein_null(x: Samples, y: Samples, *, permutations: int = 100, seed: int = 0) -> BuresNull:
    """Permutation null and p-values of ``bures_wasserstein``, part by part.

    What is dealt out anew are the samples less the mean of their class, so that a gap between the means does not enter
    the null of the covariances (residual permutation; exact only as n grows). Each is stretched by
    ``sqrt(n / (n - 1))``, which gives it back the variance that centring took. Time grows with ``permutations * n^3``.
    """
    x, y = span_coordinates(x, y)
    if min(len(x), len(y)) < 4 or permutations < 1:
        raise ReplibError(f"{len(x)} and {len(y)} samples, {permutations} permutations; needs 4 a class and 1.")
    value = bures_wasserstein(x, y)
    rows = torch.cat([(c - c.mean(0)) * math.sqrt(len(c) / (len(c) - 1)) for c in (x, y)])
    gram, generator = rows @ rows.mT, torch.Generator().manual_seed(seed)
    orders = (torch.randperm(len(rows), generator=generator) for _ in range(permutations))
    null = torch.tensor([_parts(gram, order.tensor_split([len(x)])) for order in orders], dtype=rows.dtype)
    reached = (null >= torch.tensor(value, dtype=rows.dtype) * (1 - 1e-9)).double().sum(0)
    quantiles = null.quantile(torch.tensor([0.025, 0.975], dtype=rows.dtype), dim=0)
    summaries = null.mean(0), *quantiles, (reached + 1) / (permutations + 1)
    return BuresNull(value, *(BuresWasserstein(*summary.tolist()) for summary in summaries))


def _parts(gram: Float[Tensor, "n n"], order: tuple[Tensor, ...]) -> BuresWasserstein:
    """Distance of two sets of rows from their inner products alone.

    By the trace form and squared singular values, which are quicker: a null is never near zero.
    """
    first, second = order
    n, m = len(first), len(second)
    members = torch.zeros(len(gram), 2, dtype=gram.dtype)
    members[first, 0], members[second, 1] = 1 / n, 1 / m
    (own, between), (_, other) = (members.mT @ gram @ members).tolist()
    energy = [float(gram.diagonal()[part].mean()) for part in order]
    variances = (energy[0] - own) * n / (n - 1) + (energy[1] - other) * m / (m - 1)
    cross = gram[second][:, first]
    cross = cross - cross.mean(0) - cross.mean(1, keepdim=True) + between
    squares = torch.linalg.eigvalsh(cross @ cross.mT if n > m else cross.mT @ cross)
    overlap = float(squares.clamp_min(0).sqrt().sum()) / math.sqrt((n - 1) * (m - 1))
    mean, covariance = own - 2 * between + other, variances - 2 * overlap
    return BuresWasserstein(mean, covariance, mean + covariance)


def _upper(factor: Float[Tensor, "n d"]) -> Float[Tensor, "r d"]:
    return torch.linalg.qr(factor, mode="r")[1] if len(factor) > factor.shape[1] else factor


def _squared_bures(source: Float[Tensor, "n d"], target: Float[Tensor, "m d"]) -> float:
    source, target = _upper(source), _upper(target)
    size = max(len(source), len(target))
    source, target = (torch.cat([f, f.new_zeros(size - len(f), f.shape[1])]) for f in (source, target))
    left, _, right = torch.linalg.svd(target @ source.mT)
    return float((source - right.mT @ (left.mT @ target)).square().sum())


def _split_difference(x: Tensor, y: Tensor, half: int, generator: torch.Generator) -> float:
    x1, x2, y1, y2 = (
        _upper(Gaussian.of(rows[part]).factor)
        for rows in (x, y)
        for part in torch.randperm(len(rows), generator=generator)[: 2 * half].split(half)
    )
    between = _squared_bures(x1, y1) + _squared_bures(x2, y2)
    return (between - _squared_bures(x1, x2) - _squared_bures(y1, y2)) / 2
