"""Cross-fitted linear probe of many labellings in one solve.

The probe is a calibrated ridge classifier. Its hat matrix does not depend on the labels, so one decomposition a fold
gives the scores under the true labels and under every permutation.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_FOLDS = 5
_RIDGES = tuple(10.0**power for power in range(-5, 3))
"""Candidate ridges, as shares of the mean squared norm of the training rows."""
_TINY = 1e-12
"""Keeps a quotient finite if all rows are equal, as they may be before the first block."""


def cross_fitted_logits(
    rows: Float[Tensor, "n d"], labels: Bool[Tensor, "n labellings"], generator: torch.Generator
) -> Float[Tensor, "n labellings"]:
    """Log odds of the first class for every row, from a linear probe fitted on other rows.

    Each column of ``labels`` has its own probe. Folds ignore the labels, so true and permuted ones are exchangeable.
    Leave-one-out scores of the training folds choose ridge and calibration.
    """
    fold = torch.randperm(len(rows), generator=generator) % _FOLDS
    logits = torch.empty(labels.shape, dtype=rows.dtype)
    for held in (fold == i for i in range(_FOLDS)):
        inner, outer = _ridge_scores(rows[~held], labels[~held], rows[held])
        slope, offset = _platt(inner, labels[~held])
        logits[held] = slope * outer + offset
    return logits


def _ridge_scores(rows: Tensor, labels: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Leave-one-out training scores and scores of the held rows, at each labelling's best ridge."""
    mean, n = rows.mean(0), len(rows)
    target = labels.to(rows.dtype) * 2 - 1
    energy, axes = torch.linalg.eigh((rows - mean).mT @ (rows - mean))
    inside, outside = (rows - mean) @ axes, (held - mean) @ axes
    moments = inside.mT @ (target - target.mean(0))
    best = torch.full((labels.shape[1],), math.inf, dtype=rows.dtype)
    inner, outer = torch.empty_like(target), rows.new_empty(len(held), labels.shape[1])
    for ridge in _RIDGES:
        inverse = 1 / (energy.clamp_min(0) + ridge * energy.sum() / n + _TINY)
        leverage = (inside.square() @ inverse + 1 / n)[:, None]
        weights = inverse[:, None] * moments
        residual = (target - target.mean(0) - inside @ weights) / (1 - leverage)
        error = residual.square().sum(0)
        better = error < best
        best = torch.where(better, error, best)
        inner = torch.where(better, target - residual, inner)
        outer = torch.where(better, outside @ weights + target.mean(0), outer)
    return inner, outer


def _platt(scores: Tensor, labels: Tensor, steps: int = 15) -> tuple[Tensor, Tensor]:
    """Slope and offset of each column's logistic calibration, classes weighted equally, by Newton's method.

    Platt's targets ``(n + 1) / (n + 2)`` keep the slope finite when the classes separate. A probe below chance on
    left-out rows is disabled, not inverted, since leave-one-out scores anticorrelate with labels under the null.
    """
    sizes = torch.where(labels, labels.sum(0), (~labels).sum(0)).to(scores.dtype)
    target = torch.where(labels, (sizes + 1) / (sizes + 2), 1 / (sizes + 2))
    weight = 1 / sizes
    slope, offset = torch.zeros_like(scores[0]), torch.zeros_like(scores[0])
    for _ in range(steps):
        posterior = (slope * scores + offset).sigmoid()
        error, curvature = weight * (target - posterior), weight * posterior * (1 - posterior)
        c0, c1, c2 = (curvature.sum(0), (curvature * scores).sum(0), (curvature * scores.square()).sum(0))
        g0, g1 = error.sum(0), (error * scores).sum(0)
        determinant = (c0 * c2 - c1.square()).clamp_min(_TINY)
        slope = slope + (c0 * g1 - c1 * g0) / determinant
        offset = offset + (c2 * g0 - c1 * g1) / determinant
    useful = slope > 0
    return slope * useful, offset * useful
