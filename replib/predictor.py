"""Can blocks be told vulnerable without asking the model anything: measured success against label-free features.

The predictor is a ridge regression on the logarithms of the features, fitted on all models but one and tried on that
one. It is ours, as is the test; what it must beat is the success of the other models at the same depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from replib.core.errors import ReplibError
from replib.core.stats import spearman

RIDGE = 1.0  # per row of the features in units of their deviation: a tenth of what a hundred blocks say
AT_DEPTH = "others at this depth"


def within_models(table: pd.DataFrame, names: Sequence[str], *, target: str, model: str) -> pd.DataFrame:
    """Spearman of each feature with the target over the blocks of each model: a row a model, a column a feature."""
    groups = table.groupby(model, sort=False)
    return pd.DataFrame({m: {f: spearman(*g[[f, target]].to_numpy(float).T) for f in names} for m, g in groups}).T


def leave_one_out(table: pd.DataFrame, names: Sequence[str], *, target: str, model: str, depth: str) -> pd.DataFrame:
    """Success of every block, predicted from models that are not its own: columns ``predicted`` and ``AT_DEPTH``.

    Raises ReplibError where there is only one model.
    """
    if table[model].nunique() < 2:
        raise ReplibError("One model cannot be predicted from others: give the blocks of two at least.")
    parts = []
    for name, own in table.groupby(model, sort=False):
        others = table[table[model] != name]
        at_depth = others.groupby(depth)[target].mean()
        guess = _ridge(_log(others[[*names]]), others[target].to_numpy(), _log(own[[*names]]))
        parts.append(own.assign(predicted=guess.clip(0, 1), **{AT_DEPTH: own[depth].map(at_depth)}))
    return pd.concat(parts).loc[table.index]


def scores(found: pd.DataFrame, *, target: str, model: str) -> pd.DataFrame:
    """Of ``leave_one_out``: Spearman over blocks and mean absolute error of both guesses, a row a model."""
    rows = {}
    for name, own in found.groupby(model, sort=False):
        truth = own[target].to_numpy()
        rows[name] = {
            f"{guess}, {what}": score
            for guess in ("predicted", AT_DEPTH)
            for what, score in (
                ("Spearman", spearman(own[guess].to_numpy(), truth)),
                ("error", float(np.abs(own[guess] - truth).mean())),
            )
        }
    return pd.DataFrame(rows).T


def _log(values: pd.DataFrame) -> Float[np.ndarray, "n f"]:
    """Features span decades; estimates below zero count as zero."""
    return np.log1p(np.maximum(values.to_numpy(float), 0))


def _ridge(x: Float[np.ndarray, "n f"], y: Float[np.ndarray, " n"], new: Float[np.ndarray, "m f"]) -> np.ndarray:
    mean, spread = x.mean(0), np.maximum(x.std(0), 1e-9)
    z = (x - mean) / spread
    weights = np.linalg.solve(z.T @ z + RIDGE * np.eye(z.shape[1]), z.T @ (y - y.mean()))
    return y.mean() + (new - mean) / spread @ weights
