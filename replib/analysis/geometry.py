"""Where, and how far, a model separates two classes of prompts: PCA, distances, Jensen-Shannon divergence.

Inputs are activations of one layer, ``[prompts, dim]``, or of all, ``[layers, prompts, dim]``. Whatever
depends on inner products alone is computed in the pooled span of the samples, an exact isometry, so that
cost follows the number of prompts and not the width of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from replib.analysis.divergence import LN2, _bootstrap, _evidence, _labelled, _mean_of_classes, _middle, _p_value
from replib.analysis.probe import cross_fitted_logits
from replib.core.errors import ReplibError
from replib.transport.bures_wasserstein import bures_wasserstein_debiased, bures_wasserstein_null
from replib.transport.gaussians import Samples, as_samples, principal_axes, span_coordinates


@dataclass(frozen=True)
class PCA:
    """Principal components of activations; call it to project others into the same axes."""

    mean: Float[Tensor, " d"]
    components: Float[Tensor, "k d"]
    """Orthonormal rows; the coordinate of largest magnitude of each is positive."""
    scores: Float[Tensor, "*batch k"]
    """Coordinates of the fitted activations, in the units of the activations."""
    ratio: Float[Tensor, " k"]
    """Share of the total variance along each component."""

    def __call__(self, x: Samples) -> Float[Tensor, "*batch k"]:
        """Coordinates of activations ``[..., d]`` in these components."""
        return (torch.as_tensor(x).to("cpu", torch.float64) - self.mean) @ self.components.mT


def pca(x: Samples, k: int = 2) -> PCA:
    """Centred PCA without scaling of the features (RepBend Fig. 4a,b), float64.

    Leading axes of ``x`` are pooled for the fit and kept in ``scores``: ``pca(values[layer])`` gives one
    layer its own axes, ``pca(values)`` of ``[layers, prompts, dim]`` gives all layers common ones.
    """
    values = torch.as_tensor(x).detach().to("cpu", torch.float64)
    rows = as_samples(values.flatten(0, -2) if values.ndim > 2 else values, "sample")
    if k < 1:
        raise ReplibError(f"k is {k}; a projection needs at least one component.")
    mean = rows.mean(0)
    axes, energy = principal_axes(rows - mean, k)
    return PCA(mean, axes.mT, (values - mean) @ axes, energy[:k] / energy.sum())


class Distances(NamedTuple):
    """Mean Euclidean distances between and within two classes of activations."""

    paired: float
    """Prompt i of one class to prompt i of the other, as in RepBend's own cosine plots."""
    between: float
    """All pairs of one prompt from each class; RepBend Fig. 4c, whose pairing is not stated."""
    centroids: float
    """Between the two means."""
    within_harmful: float
    within_harmless: float
    """Pairs of distinct prompts of one class: the control, as mere spread also grows ``between``."""


def pairwise_distance(harmful: Samples, harmless: Samples) -> Distances:
    """Mean distances of two samples ``[prompts, dim]``, in the units of the activations."""
    x, y = span_coordinates(harmful, harmless)
    pairs = min(len(x), len(y))
    if pairs < 2:
        raise ReplibError("one prompt has no distances within its class; give at least two prompts a class.")
    return Distances(
        paired=float((x[:pairs] - y[:pairs]).norm(dim=1).mean()),
        between=float(torch.cdist(x, y).mean()),
        centroids=float((x.mean(0) - y.mean(0)).norm()),
        within_harmful=float(torch.pdist(x).mean()),
        within_harmless=float(torch.pdist(y).mean()),
    )


@dataclass(frozen=True)
class LayerProfile:
    """How far apart two classes are, layer by layer, with the control or null that each number needs.

    Columns: ``layer``; those of ``Distances``; ``spread``, mean total variance of the classes; ``bw_mean``
    and ``bw_covariance``, debiased squared Bures-Wasserstein parts, each with the 2.5 % and 97.5 % points of the plain
    distance under permuted labels, less their mean (``bw_mean_low``, ``bw_mean_high``, …), and its permutation
    p-value (``bw_mean_p``, …); ``auroc`` and ``accuracy`` (mean of the classes') of the cross-fitted probe; ``js`` of
    that probe in nats with bootstrap interval ``js_low``, ``js_high``; ``js_null``, 97.5 % point under permuted
    labels, and ``js_p``, the permutation p-value.
    """

    columns: dict[str, np.ndarray]
    """Column to array ``[layers]``; ``pandas.DataFrame(profile.columns)`` is the table."""
    n: tuple[int, int]
    permutations: int
    splits: int
    seed: int

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]


def layer_profile(
    harmful: Samples,
    harmless: Samples,
    *,
    permutations: int = 100,
    splits: int = 4,
    seed: int = 0,
) -> LayerProfile:
    """Separation of two classes ``[layers, prompts, dim]`` layer by layer; columns as in ``LayerProfile``.

    One thread takes about 0.4 s a layer for 200 prompts a class of width 160, 1 s for 256 of width 4096; most of it
    are the relabelled Bures-Wasserstein distances, whose time grows with ``permutations``.
    """
    if harmful.ndim != 3 or harmless.ndim != 3 or not 0 < len(harmful) == len(harmless):
        raise ReplibError(
            f"activations have shapes {tuple(harmful.shape)} and {tuple(harmless.shape)}; "
            "both must be [layers, prompts, dim] with the same layers."
        )
    rows = [
        {"layer": layer} | _profile_layer(x, y, permutations=permutations, splits=splits, seed=seed)
        for layer, (x, y) in enumerate(zip(harmful, harmless, strict=True))
    ]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return LayerProfile(columns, (harmful.shape[1], harmless.shape[1]), permutations, splits, seed)


def _profile_layer(x: Samples, y: Samples, *, permutations: int, splits: int, seed: int) -> dict[str, float]:
    x, y = span_coordinates(x, y)
    rows, labels, generator = _labelled(x, y, permutations, seed)
    logits = cross_fitted_logits(rows, labels, generator)
    evidence = _evidence(logits, labels)
    values = LN2 + _mean_of_classes(evidence, labels)
    low, high = _bootstrap(evidence[:, 0], labels[:, 0], generator)
    return pairwise_distance(x, y)._asdict() | {
        "spread": float(x.var(0).sum() + y.var(0).sum()) / 2,
        **_transport_gap(x, y, permutations=permutations, splits=splits, seed=seed),
        "auroc": _auroc(logits[:, 0], labels[:, 0]),
        "accuracy": float(_mean_of_classes(((logits > 0) == labels).double(), labels)[0]),
        "js": float(values[0]),
        "js_low": low,
        "js_high": high,
        "js_null": _middle(values[1:])[1],
        "js_p": _p_value(values),
    }


def _transport_gap(x: Samples, y: Samples, *, permutations: int, splits: int, seed: int) -> dict[str, float]:
    gap = bures_wasserstein_debiased(x, y, splits=splits, seed=seed)
    null = bures_wasserstein_null(x, y, permutations=permutations, seed=seed)
    found: dict[str, float] = {}
    for part in ("mean", "covariance"):
        value, low, high, centre, p = (getattr(o, part) for o in (gap, null.low, null.high, null.centre, null.p_value))
        found |= {part: value, f"{part}_low": low - centre, f"{part}_high": high - centre, f"{part}_p": p}
    return {f"bw_{name}": value for name, value in found.items()}


def _auroc(scores: Tensor, labels: Tensor) -> float:
    wins = (scores[labels][:, None] - scores[~labels][None]).sign()
    return float((wins.mean() + 1) / 2)


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
