"""Bases of a few axes for Gaussian transport: pooled principal axes, with or without the mean gap first.

The pool includes the between-class term; axes of the scatter within classes miss the gap between them. ``pooled`` is
PCA-OT's (arXiv 2603.04355); ``mean_first`` is ours, for models whose few massive coordinates fill the pooled axes.
"""

from __future__ import annotations

import math
import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError
from replib.transport.gaussians import Gaussian, principal_axes


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


BASES = {"pooled": pooled, "mean_first": mean_first}


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
