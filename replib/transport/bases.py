"""The few axes inside which one cloud is carried onto another: four readings of the pooled principal axes.

The between-class term belongs to the pool: axes of the scatter within classes alone miss the gap that is to be closed.
PCA-OT (arXiv 2603.04355) pools; the other three are ours, for models whose few massive coordinates would fill such a
basis. They choose the axes only: means and covariances inside them are those of the activations as they are.
"""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError
from replib.transport.gaussians import Gaussian, oriented, principal_axes

CLIPPED = 0.005
"""Share of the coordinates of each sample that 'winsorised' holds to the size of the next largest."""


def pooled_rows(source: Gaussian, target: Gaussian) -> Float[Tensor, "r d"]:
    """``Z`` with ``Z^T Z`` the scatter of both classes about their pooled mean.

    ``Z = [sqrt(n_s - 1) F_s; sqrt(n_t - 1) F_t; sqrt(n_s n_t / (n_s + n_t)) (m_t - m_s)]``.
    """
    between = math.sqrt(source.n * target.n / (source.n + target.n)) * (target.mean - source.mean)
    return torch.cat([*(cloud.factor * math.sqrt(cloud.n - 1) for cloud in (source, target)), between[None]])


def pooled(source: Gaussian, target: Gaussian, k: int | None) -> Float[Tensor, "d k"]:
    """Principal axes of both classes together."""
    return principal_axes(pooled_rows(source, target), k)[0]


def mean_first(source: Gaussian, target: Gaussian, k: int | None) -> Float[Tensor, "d k"]:
    """The mean gap, then pooled principal axes of what is orthogonal to it."""
    gap = target.mean - source.mean
    if not gap.any():
        raise ReplibError("the classes have one mean, 'mean_first' has no first axis; use 'pooled'.")
    first = (gap / gap.norm())[:, None]
    rows = pooled_rows(source, target)
    rest = principal_axes(rows - rows @ first @ first.mT, None if k is None else k - 1)[0]
    return torch.cat([first, rest], dim=1)


def winsorised(source: Gaussian, target: Gaussian, k: int | None) -> Float[Tensor, "d k"]:
    """Pooled principal axes after the largest coordinates of each sample were clipped, see ``CLIPPED``."""
    _check_few(k, "winsorised")
    total = source.n + target.n
    middle = (source.mean * source.n + target.mean * target.n) / total
    rows = torch.cat([c.samples("basis 'winsorised'") + (c.mean - middle) for c in (source, target)])
    spared = rows.shape[1] - math.ceil(CLIPPED * rows.shape[1])
    if spared < 1:
        raise ReplibError("one coordinate cannot be winsorised; use 'pooled'.")
    limit = rows.abs().kthvalue(spared, dim=1, keepdim=True).values
    rows = rows.clamp(-limit, limit)
    return principal_axes(rows - rows.mean(0), k)[0]


def standardised(source: Gaussian, target: Gaussian, k: int | None) -> Float[Tensor, "d k"]:
    """Axes read off by pooled principal axes of the coordinates over their deviations, ``span(D^-1 V)``.

    A coordinate that is constant in both classes takes no part.
    """
    _check_few(k, "standardised")
    rows = pooled_rows(source, target)
    deviations = rows.norm(dim=0)
    inverse = torch.where(deviations > 1e-12 * deviations.max(), 1 / deviations, 0.0)
    return oriented(torch.linalg.qr(inverse[:, None] * principal_axes(rows * inverse, k)[0])[0])


BASES = {"pooled": pooled, "mean_first": mean_first, "winsorised": winsorised, "standardised": standardised}


def share_inside(axes: Float[Tensor, "d k"], gap: Float[Tensor, " d"]) -> float:
    """``rho_K = |P^T gap|^2 / |gap|^2``; warns below one half, where the map would barely move the means."""
    total = float(gap.square().sum())
    rho = float((gap @ axes).square().sum()) / total if total > 0 else 1.0
    if rho < 0.5:
        warnings.warn(
            f"the basis holds {rho:.0%} of the squared mean gap, so the map barely moves the means; "
            "raise k or use basis='mean_first'.",
            stacklevel=3,
        )
    return rho


def _check_few(k: int | None, basis: str) -> None:
    if k is None:
        raise ReplibError(f"k=None takes the whole span, of which {basis!r} has no part to choose; use 'pooled'.")
