"""Null edits, which attribute a method's effect to classes, subspace, mean and covariance.

Each takes the ``fit`` of a method and returns another fit, ``(harmful, harmless, k) -> edit``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError
from replib.core.stats import two_way_interval, two_way_rate_interval
from replib.transport.affine import AffineEdit

_FitEdit = Callable[[Tensor, Tensor, int], AffineEdit]


def mean_only(fit: _FitEdit) -> _FitEdit:
    """Shift by the displacement of the source's mean; the sum with ``covariance_only`` is the edit itself."""

    def run(source: Tensor, target: Tensor, k: int) -> AffineEdit:
        edit = fit(source, target, k)
        return AffineEdit.shift(edit.displacement(source.mean(0)))

    return run


def covariance_only(fit: _FitEdit) -> _FitEdit:
    """Change of spread about the source's mean, which is not moved."""

    def run(source: Tensor, target: Tensor, k: int) -> AffineEdit:
        edit = fit(source, target, k)
        return replace(edit, c=edit.c - edit.displacement(source.mean(0)))

    return run


def random_labels(fit: _FitEdit, *, seed: int = 0) -> _FitEdit:
    """Method fitted on the same prompts with random classes."""

    def run(source: Tensor, target: Tensor, k: int) -> AffineEdit:
        rows = torch.cat([source, target])
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        return fit(rows[: len(source)], rows[len(source) :], k)

    return run


def harmless_split(fit: _FitEdit, *, seed: int = 0) -> _FitEdit:
    """Method fitted from one random half of the harmless prompts to the other."""

    def run(_source: Tensor, target: Tensor, k: int) -> AffineEdit:
        if len(target) < 4:
            raise ReplibError(f"{len(target)} harmless prompts do not give two halves: add prompts, 4 at least.")
        order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
        return fit(target[order[::2]], target[order[1::2]], k)

    return run


def random_subspace(fit: _FitEdit, *, seed: int = 0) -> _FitEdit:
    """Edit rotated into a random subspace, isotropic in all d coordinates, of equal energy on the source."""

    def run(source: Tensor, target: Tensor, k: int) -> AffineEdit:
        edit = fit(source, target, k)
        rotated = _rotated(edit, seed)
        return rotated * (_energy(edit, source) / _energy(rotated, source)) ** 0.5

    return run


def _energy(edit: AffineEdit, x: Float[Tensor, "n d"]) -> float:
    """Mean squared displacement of the rows."""
    return float(edit.displacement(x).square().sum(1).mean())


def _rotated(edit: AffineEdit, seed: int) -> AffineEdit:
    """Replace the orthonormal basis of the edit's columns by a random one."""
    if edit.s is not None:
        raise ReplibError("An edit with a gain per coordinate has no subspace to rotate: use an edit of low rank.")
    rank = edit.u.shape[1]
    within = torch.linalg.qr(torch.cat([edit.u, edit.v, edit.c[:, None]], 1), mode="reduced")[1]
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(edit.width, len(within), generator=generator, dtype=within.dtype)
    u, v, c = (torch.linalg.qr(random)[0] @ within).split([rank, rank, 1], dim=1)
    return replace(edit, u=u, v=v, c=c[:, 0])


CONTROLS = {
    "mean_only": mean_only,
    "covariance_only": covariance_only,
    "random_subspace": random_subspace,
    "random_labels": random_labels,
    "harmless_split": harmless_split,
}
_RANDOM = ("random_subspace", "random_labels", "harmless_split")
"""Controls with a random draw, which take a ``seed``."""
FULL = "full"


def variants(fit: _FitEdit, draws: int = 3) -> dict[str, list[_FitEdit]]:
    """The fit and its controls, random ones with ``draws`` seeds."""
    seeds = [{"seed": i} for i in range(draws)]
    return {FULL: [fit]} | {
        name: [control(fit, **seed) for seed in (seeds if name in _RANDOM else [{}])]
        for name, control in CONTROLS.items()
    }


def attributed(rates: dict[str, Float[np.ndarray, "seeds prompts"]]) -> pd.DataFrame:
    """Success rate of each variant, and its loss against the full edit on the same prompts and seeds.

    Columns: variant, value, low, high, n, ``less``, ``less_low``, ``less_high``; intervals are two-way.
    """
    rows = []
    for name, values in rates.items():
        gap = rates[FULL] - values
        rate = values.mean(), *two_way_rate_interval(values), values.size
        rows.append((name, *rate, gap.mean(), *two_way_interval(gap)))
    return pd.DataFrame(rows, columns=["variant", "value", "low", "high", "n", "less", "less_low", "less_high"])
