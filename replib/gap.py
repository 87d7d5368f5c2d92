"""How far apart two classes of prompts lie for a transport, block by block, in units of their own spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from replib.edits.gates import Gate
from replib.transport.gaussian_map import GaussianMap
from replib.transport.gaussians import Samples, sample_pair


class Features(NamedTuple):
    """What can be said of a block without asking the model anything: two clouds of activations are enough."""

    depth: float
    """Blocks below it, as a share of the model's."""
    mean_gap: float
    """Debiased ``|m_x - m_y|²`` over the mean total variance of the classes."""
    covariance_gap: float
    """Debiased squared Bures distance of the covariances over the same."""
    mahalanobis: float
    """``gap^T (S + l I)^-1 gap``, S within classes, l its mean variance."""
    rho: float
    """Share of the squared mean gap inside the K axes of the map."""
    rank: float
    """Effective rank of S, ``(tr S)² / |S|²``."""
    gain: float
    """``|A - I| / sqrt(K)`` of the map: how far it is from a mere shift."""
    cost: float
    """Mean squared displacement of the map over the mean total variance of the classes."""


def features(harmful: Samples, harmless: Samples, gaps: Sequence[float], *, depth: float, k: int = 2) -> Features:
    """Features of one block, from activations ``[n, d]`` and ``[m, d]`` and its relative gaps, mean and covariance."""
    x, y = sample_pair(harmful, harmless)
    fitted = GaussianMap(k=k).fit(x, y)
    within = torch.cat([x - x.mean(0), y - y.mean(0)])
    discriminant = Gate.fit(x, y, 0).w.double()  # (S + l I)^-1 gap, times l
    ridge = float(within.square().sum()) / (len(within) - 2) / x.shape[1]
    identity = torch.eye(k, dtype=fitted.scale_.dtype)
    return Features(
        depth=depth,
        mean_gap=gaps[0],
        covariance_gap=gaps[1],
        mahalanobis=float(discriminant @ (x.mean(0) - y.mean(0))) / ridge,
        rho=fitted.rho_,
        rank=_effective_rank(within),
        gain=float((fitted.scale_ - identity).norm()) / k**0.5,
        cost=fitted.cost_ / float((x.var(0) + y.var(0)).sum() / 2),
    )


def _effective_rank(rows: Float[Tensor, "n d"]) -> float:
    """Participation ratio of the spectrum of centred rows, from their inner products."""
    gram = rows @ rows.mT
    return float(gram.trace().square() / gram.square().sum())
