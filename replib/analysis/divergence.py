"""Jensen-Shannon divergence: of categorical distributions, and estimated between two classes of activations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from replib.analysis.probe import cross_fitted_logits
from replib.core.errors import ReplibError
from replib.core.stats import kl, percentile_interval, resamples
from replib.transport.gaussians import Samples, sample_pair, span_coordinates

LN2 = math.log(2)
_BINS = 50
"""Histogram cells per coordinate, shared by both classes."""
_MIN_PROMPTS = 10
"""Fewest prompts per class for an estimate."""


def js_discrete(logits_p: Tensor, logits_q: Tensor) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence, in nats, of categorical distributions given by logits over the last axis.

    ``JS = (KL(p|m) + KL(q|m)) / 2``, ``m = (p + q) / 2``; 0 for equal distributions, ln 2 for disjoint ones. A logit
    of -inf is probability zero. Computed in float32 or better.
    """
    dtype = torch.promote_types(torch.promote_types(logits_p.dtype, logits_q.dtype), torch.float32)
    log_p, log_q = logits_p.to(dtype).log_softmax(-1), logits_q.to(dtype).log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - LN2
    return ((kl(log_p, log_m) + kl(log_q, log_m)) / 2).clamp(0, LN2)


@dataclass(frozen=True)
class JSDivergence:
    """Estimate of the Jensen-Shannon divergence of two classes, in nats, with its permutation null."""

    value: float
    """At most ln 2. The classifier's is a lower bound and may fall below zero by chance."""
    null: tuple[float, float]
    """2.5 % and 97.5 % points under permuted labels, the estimator's bias and noise at this n."""
    p_value: float
    interval: tuple[float, float] | None
    """95 % bootstrap interval of the classifier's value; None for histograms, where resampling adds bias."""
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
        a: activations of one class.
        b: activations of the other.
        estimator: ``classifier``: ``ln 2 + (E_a ln s + E_b ln(1 - s)) / 2`` with ``s`` the posterior of a cross-fitted
            linear probe, a lower bound. ``hist_dim``: mean over coordinates of the divergence of their histograms, a
            candidate for RepBend Fig. 4d (estimator not published); it depends on the coordinate system.
        permutations: relabellings behind ``null`` and ``p_value``.
        seed: seed of folds, permutations and bootstrap.

    Raises:
        ReplibError: unknown estimator, fewer than 10 prompts a class, no permutation, unusable activations.
    """
    a, b = sample_pair(a, b) if estimator == "hist_dim" else span_coordinates(a, b)
    rows, labels, generator = labelled(a, b, permutations, seed)
    interval = None
    if estimator == "classifier":
        values, interval = classifier_js(cross_fitted_logits(rows, labels, generator), labels, generator)
    elif estimator == "hist_dim":
        values = _hist_dim(rows, labels)
    else:
        raise ReplibError(f"estimator is {estimator!r}; choose 'classifier' or 'hist_dim'.")
    return JSDivergence(
        value=float(values[0]),
        null=percentile_interval(values[1:]),
        p_value=p_value(values),
        interval=interval,
        estimator=estimator,
        n=(len(a), len(b)),
        permutations=permutations,
        seed=seed,
    )


def labelled(
    a: Tensor, b: Tensor, permutations: int, seed: int
) -> tuple[Float[Tensor, "n d"], Bool[Tensor, "n labellings"], torch.Generator]:
    """Pooled rows, their labels (True: first class) and the generator; column 0 is true, the others are permuted.

    Raises ReplibError for fewer than 10 prompts a class or no permutation.
    """
    if min(len(a), len(b)) < _MIN_PROMPTS or permutations < 1:
        raise ReplibError(
            f"{len(a)} and {len(b)} prompts, {permutations} permutations; "
            f"a divergence needs {_MIN_PROMPTS} prompts a class and at least one permutation."
        )
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(len(a) + len(b)) < len(a)
    shuffled = [truth[torch.randperm(len(truth), generator=generator)] for _ in range(permutations)]
    return torch.cat([a, b]), torch.stack([truth, *shuffled], dim=1), generator


def classifier_js(
    logits: Float[Tensor, "n labellings"], labels: Bool[Tensor, "n labellings"], generator: torch.Generator
) -> tuple[Float[Tensor, " labellings"], tuple[float, float]]:
    """Classifier estimate under each labelling, and the 95 % bootstrap interval of the true one, in nats.

    The bootstrap resamples rows within their class, 1000 times; the probe is not fitted again.
    """
    log_posterior = torch.nn.functional.logsigmoid(torch.where(labels, logits, -logits))
    first, second = ((log_posterior * mask).sum(0) / mask.sum(0) for mask in (labels, ~labels))
    one, other = (
        values[resamples(len(values), generator)].mean(1)
        for values in (log_posterior[labels[:, 0], 0], log_posterior[~labels[:, 0], 0])
    )
    return LN2 + (first + second) / 2, percentile_interval(LN2 + (one + other) / 2)


def _hist_dim(rows: Float[Tensor, "n d"], labels: Bool[Tensor, "n labellings"]) -> Float[Tensor, " labellings"]:
    """Mean over coordinates of the divergence of their histograms, cells between pooled minimum and maximum."""
    low, high = rows.amin(0), rows.amax(0)
    width = torch.where(high > low, high - low, 1) / _BINS
    cells = ((rows - low) / width).long().clamp_max(_BINS - 1)
    columns = (column[:, None].expand(cells.shape) for column in labels.mT)
    return torch.stack([_histogram_js(cells, column).mean() for column in columns])


def _histogram_js(cells: Tensor, labels: Tensor) -> Tensor:
    counts = [
        torch.zeros(_BINS, cells.shape[1], dtype=torch.float64).scatter_add_(0, cells, mask.double())
        for mask in (labels, ~labels)
    ]
    return js_discrete(counts[0].log().mT, counts[1].log().mT)


def p_value(values: Float[Tensor, " labellings"]) -> float:
    """Share of labellings, the true one included, whose value is at least that of the true one.

    The slack makes disabled probes tie: each gives zero up to rounding.
    """
    return float((values >= values[0] - 1e-12).double().mean())
