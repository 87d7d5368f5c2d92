"""Layer profile: separation of two classes of activations, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from replib.analysis.divergence import classifier_js, labelled, p_value
from replib.analysis.geometry import pairwise_distance
from replib.analysis.probe import cross_fitted_logits
from replib.core.errors import ReplibError
from replib.core.stats import percentile_interval
from replib.transport.bures_wasserstein import bures_wasserstein_debiased, bures_wasserstein_null
from replib.transport.gaussians import Samples, span_coordinates

PARTS = ("mean", "covariance")
_COLUMN_ENDS = {"value": "", "low": "_low", "high": "_high"}


@dataclass(frozen=True)
class LayerProfile:
    """Separation of two classes by layer, each measure with its control or null.

    Columns: ``layer``; the fields of ``Distances``; ``spread``, mean total variance of the classes; ``bw_mean`` and
    ``bw_covariance``, debiased squared Bures-Wasserstein parts, each with the 2.5 % and 97.5 % points of the plain
    distance under permuted labels, centred (``bw_mean_low``, ``bw_mean_high``, …), and its permutation p-value
    (``bw_mean_p``, …); ``auroc`` and balanced ``accuracy`` of the cross-fitted linear probe; ``js`` of that probe in
    nats with bootstrap interval ``js_low``, ``js_high``; ``js_null``, 97.5 % point under permuted labels, and ``js_p``,
    its permutation p-value.
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
    """Separation of two classes ``[layers, prompts, dim]`` by layer; columns as in ``LayerProfile``.

    One thread takes about 0.4 s a layer for 200 prompts a class of width 160, 1 s for 256 of width 4096, most of it for
    the relabelled Bures-Wasserstein distances (linear in ``permutations``).

    Raises ReplibError for other shapes or unequal layers, and as ``js_divergence``.
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
    rows, labels, generator = labelled(x, y, permutations, seed)
    logits = cross_fitted_logits(rows, labels, generator)
    values, (low, high) = classifier_js(logits, labels, generator)
    return pairwise_distance(x, y)._asdict() | {
        "spread": float(x.var(0).sum() + y.var(0).sum()) / 2,
        **_transport_gap(x, y, permutations=permutations, splits=splits, seed=seed),
        "auroc": float(roc_auc_score(labels[:, 0], logits[:, 0])),
        "accuracy": float(balanced_accuracy_score(labels[:, 0], logits[:, 0] > 0)),
        "js": float(values[0]),
        "js_low": low,
        "js_high": high,
        "js_null": percentile_interval(values[1:])[1],
        "js_p": p_value(values),
    }


def _transport_gap(x: Samples, y: Samples, *, permutations: int, splits: int, seed: int) -> dict[str, float]:
    gap = bures_wasserstein_debiased(x, y, splits=splits, seed=seed)
    null = bures_wasserstein_null(x, y, permutations=permutations, seed=seed)
    columns: dict[str, float] = {}
    for part in PARTS:
        value, low, high, centre, p = (getattr(o, part) for o in (gap, null.low, null.high, null.centre, null.p_value))
        columns |= {part: value, f"{part}_low": low - centre, f"{part}_high": high - centre, f"{part}_p": p}
    return {f"bw_{name}": value for name, value in columns.items()}


def relative_gaps(profile: LayerProfile) -> pd.DataFrame:
    """Debiased squared Bures-Wasserstein parts over the mean total variance of the classes, a row a block and part.

    Columns: layer, part, value, ``low`` and ``high`` (95 % interval under permuted labels), ``p``. At 1 the classes lie
    as far apart as their prompts are spread; an estimate may fall below 0.
    """
    spread = profile["spread"]
    return pd.concat(
        [
            pd.DataFrame(
                {"layer": profile["layer"], "part": part}
                | {name: profile[f"bw_{part}{end}"] / spread for name, end in _COLUMN_ENDS.items()}
                | {"p": profile[f"bw_{part}_p"]}
            )
            for part in PARTS
        ],
        ignore_index=True,
    )
