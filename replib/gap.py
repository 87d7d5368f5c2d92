"""How far apart two classes of prompts lie for a transport, block by block, in units of their own spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from replib.gates import Gate
from replib.geometry import LayerProfile
from replib.transport.gaussian_map import GaussianMap
from replib.transport.gaussians import Samples, sample_pair

PARTS = ("mean", "covariance")


def relative_gaps(profile: LayerProfile) -> pd.DataFrame:
    """Debiased squared Bures-Wasserstein parts over the mean total variance of the classes, a row a block and part.

    Columns: layer, part, value, ``low`` and ``high`` (95 % of what relabelled prompts give), ``p``. 1 says that the
    classes lie as far apart as their prompts are spread; an estimate may fall below 0.
    """
    spread = profile["spread"]
    return pd.concat(
        [
            pd.DataFrame(
                {"layer": profile["layer"], "part": part}
                | {name: profile[f"bw_{part}{end}"] / spread for name, end in ENDS.items()}
                | {"p": profile[f"bw_{part}_p"]}
            )
            for part in PARTS
        ],
        ignore_index=True,
    )


ENDS = {"value": "", "low": "_low", "high": "_high"}


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
