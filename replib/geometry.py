"""Where, and how far, a model separates two classes of prompts: PCA, distances, Jensen-Shannon divergence.

Inputs are activations of one layer, ``[prompts, dim]``, or of all, ``[layers, prompts, dim]``. Whatever
depends on inner products alone is computed in the pooled span of the samples, an exact isometry, so that
cost follows the number of prompts and not the width of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from replib.bures import bures_wasserstein_debiased, bures_wasserstein_null
from replib.clouds import Samples, as_samples, principal_axes, sample_pair, span_coordinates
from replib.errors import ReplibError
from replib.probe import cross_fitted_logits

LN2 = math.log(2)
BINS = 50
"""Histogram cells per axis, shared by both classes."""
FEWEST = 10
"""Prompts per class below which a divergence cannot be estimated."""


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


def js_discrete(logits_p: Tensor, logits_q: Tensor) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence, in nats, of categorical distributions given by logits over the last axis.

    ``JS = (KL(p|m) + KL(q|m)) / 2``, ``m = (p + q) / 2``: how well one draw tells p from q. It is 0 when
    equal, ln 2 when disjoint. A logit of -inf is probability zero. Computed in float32 or better.
    """
    dtype = torch.promote_types(torch.promote_types(logits_p.dtype, logits_q.dtype), torch.float32)
    log_p, log_q = logits_p.to(dtype).log_softmax(-1), logits_q.to(dtype).log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - LN2
    return ((_kl(log_p, log_m) + _kl(log_q, log_m)) / 2).clamp(0, LN2)


@dataclass(frozen=True)
class JSDivergence:
    """An estimate of the Jensen-Shannon divergence of two classes, in nats, with what chance alone gives."""

    value: float
    """At most ln 2. The classifier's bounds the truth from below and may dip under zero by chance."""
    null: tuple[float, float]
    """2.5 % and 97.5 % points under permuted labels: the estimator's bias and noise at this n."""
    p_value: float
    interval: tuple[float, float] | None
    """95 % bootstrap interval of the classifier's value; None for histograms, which resampling biases."""
    estimator: str
    n: tuple[int, int]
    permutations: int
    seed: int

    @property
    def distance(self) -> float:
        """Square root of the divergence, a metric, at most 0.833."""
        return math.sqrt(max(self.value, 0.0))


def js_divergence(
    a: Samples,
    b: Samples,
    *,
    estimator: str = "classifier",
    permutations: int = 100,
    seed: int = 0,
) -> JSDivergence:
    """Jensen-Shannon divergence of two samples ``[prompts, dim]``, classes weighted equally.

    Args:
        a: activations of one class. b: activations of the other. estimator: ``classifier``: ``ln 2 + (E_a ln
        s + E_b ln(1 - s)) / 2`` with ``s`` the posterior of a cross-fitted linear probe, a lower bound on
        the truth; ``projection``: histograms along the difference of means, direction from one half and
        histogram from the other; ``hist_dim``: mean over coordinates of their histograms' divergence, the
        look of RepBend Fig. 4d (whose estimator is unknown), which depends on the coordinate system.
        permutations: relabellings behind ``null`` and ``p_value``. seed: of folds, halves, permutations and
        bootstrap.
    """
    a, b = sample_pair(a, b) if estimator == "hist_dim" else span_coordinates(a, b)
    rows, labels, generator = _labelled(a, b, permutations, seed)
    interval = None
    if estimator == "classifier":
        evidence = _evidence(cross_fitted_logits(rows, labels, generator), labels)
        values = LN2 + _mean_of_classes(evidence, labels)
        interval = _bootstrap(evidence[:, 0], labels[:, 0], generator)
    elif estimator in _HISTOGRAMS:
        values = _HISTOGRAMS[estimator](rows, labels, generator)
    else:
        raise ReplibError(f"estimator is {estimator!r}; choose 'classifier', 'projection' or 'hist_dim'.")
    return JSDivergence(
        value=float(values[0]),
        null=_middle(values[1:]),
        p_value=_p_value(values),
        interval=interval,
        estimator=estimator,
        n=(len(a), len(b)),
        permutations=permutations,
        seed=seed,
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


def _kl(log_p: Tensor, log_m: Tensor) -> Tensor:
    return torch.where(log_p.isinf(), 0, log_p.exp() * (log_p - log_m)).sum(-1)


def _labelled(
    a: Tensor, b: Tensor, permutations: int, seed: int
) -> tuple[Float[Tensor, "n d"], Bool[Tensor, "n labellings"], torch.Generator]:
    """Pooled rows and their labels (True: first class); column 0 is the truth, the others are shuffled."""
    if min(len(a), len(b)) < FEWEST or permutations < 1:
        raise ReplibError(
            f"{len(a)} and {len(b)} prompts, {permutations} permutations; "
            f"a divergence needs {FEWEST} prompts a class and at least one permutation."
        )
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(len(a) + len(b)) < len(a)
    shuffled = [truth[torch.randperm(len(truth), generator=generator)] for _ in range(permutations)]
    return torch.cat([a, b]), torch.stack([truth, *shuffled], dim=1), generator


def _evidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Log posterior of each row's own class."""
    return torch.nn.functional.logsigmoid(torch.where(labels, logits, -logits))


def _mean_of_classes(values: Tensor, labels: Tensor) -> Tensor:
    first, second = ((values * mask).sum(0) / mask.sum(0) for mask in (labels, ~labels))
    return (first + second) / 2


def _bootstrap(evidence: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """95 % interval of the classifier's value; rows resampled within their class, the probe held fixed."""
    first, second = (
        values[torch.randint(len(values), (1000, len(values)), generator=generator)].mean(1)
        for values in (evidence[labels], evidence[~labels])
    )
    return _middle(LN2 + (first + second) / 2)


def _projection(rows: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    halves = torch.randperm(len(rows), generator=generator).tensor_split(2)
    total = torch.zeros(labels.shape[1], dtype=rows.dtype)
    for fit, held in (halves, halves[::-1]):
        mask = labels[fit].to(rows.dtype)
        direction = rows[fit].mT @ (mask / mask.sum(0) - (1 - mask) / (1 - mask).sum(0))
        total += _histogram_js(_cells(rows[held] @ direction), labels[held])
    return total / 2


def _hist_dim(rows: Tensor, labels: Tensor, _generator: torch.Generator) -> Tensor:
    cells = _cells(rows)
    columns = (column[:, None].expand(cells.shape) for column in labels.mT)
    return torch.stack([_histogram_js(cells, column).mean() for column in columns])


_HISTOGRAMS = {"projection": _projection, "hist_dim": _hist_dim}


def _cells(values: Tensor) -> Tensor:
    """Index of the equal-width cell between each column's own minimum and maximum."""
    low, high = values.amin(0), values.amax(0)
    width = torch.where(high > low, high - low, 1) / BINS
    return ((values - low) / width).long().clamp_max(BINS - 1)


def _histogram_js(cells: Tensor, labels: Tensor) -> Tensor:
    counts = [
        torch.zeros(BINS, cells.shape[1], dtype=torch.float64).scatter_add_(0, cells, mask.double())
        for mask in (labels, ~labels)
    ]
    return js_discrete(counts[0].log().mT, counts[1].log().mT)


def _auroc(scores: Tensor, labels: Tensor) -> float:
    wins = (scores[labels][:, None] - scores[~labels][None]).sign()
    return float((wins.mean() + 1) / 2)


def _middle(values: Tensor) -> tuple[float, float]:
    """The 2.5 % and 97.5 % points."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def _p_value(values: Tensor) -> float:
    """Share of labellings, the true one among them, that reach the true one's value.

    Probes that are switched off all give zero, each with a rounding of its own: they tie.
    """
    return float((values >= values[0] - 1e-12).double().mean())
