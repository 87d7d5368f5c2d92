"""Localisation of refusal in blocks: onsets of curves, and success predicted from label-free features of a block.

The predictor is a ridge regression on the logarithms of the features, fitted on all models but one and tested on that
one. Predictor and test are ours; the baseline is the success of the other models at the same depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sklearn.linear_model import Ridge
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from replib.ablation.refusal_score import RefusalTokens
from replib.core.errors import ReplibError
from replib.core.stats import spearman
from replib.models.chat_model import ChatModel
from replib.transport.gaussian_map import GaussianMap
from replib.transport.gaussians import Samples, sample_pair

_Curve = Float[np.ndarray, " layers"]


def onset(curve: _Curve | pd.Series, *, share: float = 0.5, least: float = 0.0) -> int | None:
    """The first block at which a curve reaches a share of its maximum; None where that is 0, or below ``least``.

    Of a Series, by its index. An edit of the last prompt token before the blocks that decide is overruled by them;
    after them it is final.
    """
    known = pd.Series(curve).fillna(0)
    top = float(known.max())
    return int((known >= share * top).idxmax()) if top > 0 and top >= least else None


def steepest(curve: _Curve) -> int | None:
    """The block that adds most to a curve; None where none adds anything."""
    rise = np.diff(curve, prepend=min(0.0, float(curve[0])))
    return int(rise.argmax()) if rise.max() > 0 else None


def localisation_error(found: int | None, planted: Sequence[int]) -> float:
    """Blocks from the nearest planted one: negative is too early, 0 inside, NaN where nothing was found."""
    if found is None:
        return float("nan")
    return float(min((found - block for block in planted), key=abs))


@torch.no_grad()
def lens_profile(
    model: ChatModel, harmful: Float[Tensor, "layers n d"], harmless: Float[Tensor, "layers m d"], tokens: RefusalTokens
) -> _Curve:
    """Share of harmful prompts that the logit lens of each block would refuse, less that of harmless ones.

    Activations are those of the last prompt token; a prompt counts as refused where its refusal tokens are likelier
    than all others together.
    """
    refused = [[float((tokens.scores(model.decode(x)) > 0).double().mean()) for x in xs] for xs in (harmful, harmless)]
    return np.array(refused[0]) - np.array(refused[1])


def localisation_error_table(
    found: Mapping[str, Mapping[str, int | None]], planted: Mapping[str, Sequence[int]]
) -> pd.DataFrame:
    """Error of every method on every model, a row a pair: model, method, found, first and last planted block, error."""
    return pd.DataFrame(
        {"model": model, "method": method, "found": block, "first": min(planted[model]), "last": max(planted[model]),
         "error": localisation_error(block, planted[model])}
        for model, blocks in found.items()
        for method, block in blocks.items()
    )  # fmt: skip


RIDGE = 1.0  # penalty for standardised features, 1 % of the data term of 100 blocks
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
    ridge = make_pipeline(StandardScaler(), Ridge(alpha=RIDGE))
    x, y = _log(table[[*names]]), table[target].to_numpy()
    predicted = cross_val_predict(ridge, x, y, groups=table[model], cv=LeaveOneGroupOut()).clip(0, 1)
    at_depth = [table[table[model] != name].groupby(depth)[target].mean() for name in table[model].unique()]
    others = dict(zip(table[model].unique(), at_depth, strict=True))
    baseline = [others[name].get(place, np.nan) for name, place in zip(table[model], table[depth], strict=True)]
    return table.assign(predicted=predicted, **{AT_DEPTH: baseline})


def scores(found: pd.DataFrame, *, target: str, model: str) -> pd.DataFrame:
    """Accuracy of ``leave_one_out``: Spearman over blocks and mean absolute error of both guesses, a row a model."""
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


class Features(NamedTuple):
    """Label-free features of a block, from the activations of both classes alone."""

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


def block_features(harmful: Samples, harmless: Samples, gaps: Sequence[float], *, depth: float, k: int = 2) -> Features:
    """Features of one block, from activations ``[n, d]`` and ``[m, d]`` and its relative gaps, mean and covariance."""
    x, y = sample_pair(harmful, harmless)
    fitted = GaussianMap(k=k).fit(x, y)
    within = torch.cat([x - x.mean(0), y - y.mean(0)])
    identity = torch.eye(k, dtype=fitted.scale_.dtype)
    return Features(
        depth=depth,
        mean_gap=gaps[0],
        covariance_gap=gaps[1],
        mahalanobis=_mahalanobis(x.mean(0) - y.mean(0), within),
        rho=fitted.rho_,
        rank=_effective_rank(within),
        gain=float((fitted.scale_ - identity).norm()) / k**0.5,
        cost=fitted.cost_ / float((x.var(0) + y.var(0)).sum() / 2),
    )


def _mahalanobis(gap: Float[Tensor, " d"], rows: Float[Tensor, "n d"]) -> float:
    """``gap^T (S + l I)^-1 gap`` from the rows of both classes, each centred, without a d x d matrix."""
    _, spread, axes = torch.linalg.svd(rows, full_matrices=False)
    variance = spread.square() / (len(rows) - 2)
    ridge = variance.sum() / rows.shape[1]
    inside = (axes @ gap).square()
    return float((gap @ gap - inside.sum()) / ridge + (inside / (variance + ridge)).sum())


def _effective_rank(rows: Float[Tensor, "n d"]) -> float:
    """Participation ratio of the spectrum of centred rows, from their inner products."""
    gram = rows @ rows.mT
    return float(gram.trace().square() / gram.square().sum())
