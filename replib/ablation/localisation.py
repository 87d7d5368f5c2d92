"""Can blocks be told vulnerable without asking the model anything: measured success against label-free features.

The predictor is a ridge regression on the logarithms of the features, fitted on all models but one and tried on that
one. It is ours, as is the test; what it must beat is the success of the other models at the same depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from replib.ablation.refusal_score import RefusalTokens
from replib.core.errors import ReplibError
from replib.core.stats import spearman
from replib.models.chat_model import ChatModel
from replib.transport.gaussian_map import GaussianMap
from replib.transport.gaussians import Samples, sample_pair

Curve = Float[np.ndarray, " layers"]


def onset(curve: Curve, *, share: float = 0.5, least: float = 0.0) -> int | None:
    """The first block at which a curve reaches a share of its maximum; None where that is 0, or below ``least``."""
    known = np.nan_to_num(curve)
    top = float(known.max())
    return int(np.argmax(known >= share * top)) if top > 0 and top >= least else None


def steepest(curve: Curve) -> int | None:
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
) -> Curve:
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


def sweep_onset(table: pd.DataFrame, share: float = 0.5) -> int | None:
    """The first block at which attack success reaches ``share`` of its maximum over blocks: where refusal is decided.

    An edit of the last prompt token before the blocks that decide is overruled by them; after them it is final. None
    if no block succeeds more often than not.
    """
    by_layer = table.groupby("layer")["compliance"].max()
    found = onset(by_layer.to_numpy(float), share=share, least=0.5)
    return None if found is None else int(by_layer.index[found])


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
