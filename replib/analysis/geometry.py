"""Geometry of activations: principal components, and distances between two classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError
from replib.transport.gaussians import Samples, as_samples, principal_axes, span_coordinates


@dataclass(frozen=True)
class PCA:
    """Principal components of activations; a call projects other activations onto them."""

    mean: Float[Tensor, " d"]
    components: Float[Tensor, "k d"]
    """Orthonormal rows, each with its largest coordinate positive."""
    scores: Float[Tensor, "*batch k"]
    """Coordinates of the fitted activations, in the units of the activations."""
    ratio: Float[Tensor, " k"]
    """Share of the total variance along each component."""

    def __call__(self, x: Samples) -> Float[Tensor, "*batch k"]:
        """Coordinates of activations ``[..., d]`` in these components."""
        return (torch.as_tensor(x).to("cpu", torch.float64) - self.mean) @ self.components.mT


def pca(x: Samples, k: int = 2) -> PCA:
    """Centred PCA without scaling of the features (RepBend Fig. 4a,b), float64.

    Leading axes of ``x`` are pooled for the fit and keep their shape in ``scores``: ``pca(values[layer])`` fits one
    layer, ``pca(values)`` of ``[layers, prompts, dim]`` fits common components.

    Raises ReplibError if ``k`` is below one or above the rank.
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
    """Prompt i of one class to prompt i of the other, the pairing of RepBend's cosine plots."""
    between: float
    """All pairs of one prompt from each class; RepBend Fig. 4c (pairing not stated)."""
    centroids: float
    """Between the two means."""
    within_harmful: float
    within_harmless: float
    """Pairs of distinct prompts of one class; the control, since spread alone increases ``between``."""


def pairwise_distance(harmful: Samples, harmless: Samples) -> Distances:
    """Mean distances of two samples ``[prompts, dim]``, in the units of the activations.

    Raises ReplibError for fewer than two prompts in a class.
    """
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
