"""Where, and how far, a model separates two classes of prompts: PCA, distances, Jensen-Shannon divergence.

Inputs are activations of one layer, ``[prompts, dim]``, or of all, ``[layers, prompts, dim]``. Whatever
depends on inner products alone is computed in the pooled span of the samples, an exact isometry, so that
cost follows the number of prompts and not the width of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from replib.analysis.probe import cross_fitted_logits
from replib.core.errors import ReplibError
from replib.core.stats import kl
from replib.transport.gaussians import Samples, sample_pair, span_coordinates

LN2 = math.log(2)
BINS = 50
"""Histogram cells per axis, shared by both classes."""
FEWEST = 10
"""Prompts per class below which a divergence cannot be estimated."""


def js_discrete(logits_p: Tensor, logits_q: Tensor) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence, in nats, of categorical distributions given by logits over the last axis.

    ``JS = (KL(p|m) + KL(q|m)) / 2``, ``m = (p + q) / 2``: how well one draw tells p from q. It is 0 when
    equal, ln 2 when disjoint. A logit of -inf is probability zero. Computed in float32 or better.
    """
    dtype = torch.promote_types(torch.promote_types(logits_p.dtype, logits_q.dtype), torch.float32)
    log_p, log_q = logits_p.to(dtype).log_softmax(-1), logits_q.to(dtype).log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - LN2
    return ((kl(log_p, log_m) + kl(log_q, log_m)) / 2).clamp(0, LN2)


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


def _middle(values: Tensor) -> tuple[float, float]:
    """The 2.5 % and 97.5 % points."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def _p_value(values: Tensor) -> float:
    """Share of labellings, the true one among them, that reach the true one's value.

    Probes that are switched off all give zero, each with a rounding of its own: they tie.
    """
    return float((values >= values[0] - 1e-12).double().mean())
