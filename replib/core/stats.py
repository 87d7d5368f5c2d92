"""Rates, means and paired differences with their intervals.

Outcomes are a letter an answer: r(efusal), c(ompliance), d(egenerate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, spearmanr, t
from torch import Tensor

from replib.core.errors import ReplibError


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate."""
    interval = binomtest(successes, n).proportion_ci(level, method="wilson")
    return interval.low, interval.high


def two_way_interval(values: Float[np.ndarray, "seeds prompts"], level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean over trainings and prompts, for other seeds and other prompts.

    mean ± t sqrt(s_r²/seeds + s_c²/prompts): variances of the means of rows and of columns, t with the degrees of
    freedom of Welch and Satterthwaite. The residual variance enters both terms, so the interval is conservative. With
    one seed, prompts alone vary. For rates see ``two_way_rate_interval``.
    """
    parts = [
        (line.var(ddof=1) / len(line), len(line) - 1) for line in (values.mean(1), values.mean(0)) if len(line) > 1
    ]
    variance = sum(v for v, _ in parts)
    if variance <= 0:
        return float(values.mean()), float(values.mean())
    freedom = variance**2 / sum(v**2 / f for v, f in parts)
    half = t.ppf((1 + level) / 2, freedom) * variance**0.5
    return float(values.mean() - half), float(values.mean() + half)


def two_way_rate_interval(values: Float[np.ndarray, "seeds prompts"]) -> tuple[float, float]:
    """``two_way_interval`` cut to 0 … 1; of a constant rate the Wilson interval, n the prompts, not prompts × seeds."""
    low, high = two_way_interval(values)
    if low == high:
        return wilson(round(low * values.shape[1]), values.shape[1])
    return max(0.0, low), min(1.0, high)


# scipy.stats.bootstrap draws from numpy's generators; recorded intervals come from torch's.
def resamples(n: int, generator: torch.Generator, *, draws: int = 1000) -> Int[Tensor, "draws n"]:
    """Draw bootstrap samples as indices of n cases."""
    return torch.randint(n, (draws, n), generator=generator)


def percentile_interval(values: ArrayLike) -> tuple[float, float]:
    """95 % interval between percentiles of resampled values; NaN counts as missing."""
    values = np.asarray(values)
    if not np.isfinite(values).any():
        return float("nan"), float("nan")
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)


def interval_text(value: float, low: float, high: float, form: str = ".0f", space: str = "\N{NO-BREAK SPACE}") -> str:
    """Write ``70 [61, 78]``."""
    return f"{value:{form}}{space}[{low:{form}},{space}{high:{form}}]"


class Mean(NamedTuple):
    """A mean over tokens."""

    value: float
    low: float
    """Of its 95 % interval for other rows than these."""
    high: float
    tokens: int
    rows: int


def mean_over(values: Float[Tensor, " tokens"], row: Int[Tensor, " tokens"], *, seed: int = 0) -> Mean:
    """Mean over tokens, with a 95 % bootstrap interval over rows (1000 draws)."""
    _, place = row.unique(return_inverse=True)
    counts = torch.bincount(place).double()
    sums = torch.zeros_like(counts).index_add(0, place, values.double())
    drawn = resamples(len(counts), torch.Generator().manual_seed(seed))
    low, high = percentile_interval(sums[drawn].sum(1) / counts[drawn].sum(1))
    return Mean(float(sums.sum() / counts.sum()), low, high, len(values), len(counts))


def perplexity(nats: Float[Tensor, " tokens"], row: Int[Tensor, " tokens"], *, seed: int = 0) -> Mean:
    """Exponential of ``mean_over`` of −log p; for differences of −log p, the ratio of two perplexities."""
    mean = mean_over(nats, row, seed=seed)
    value, low, high = np.exp([mean.value, mean.low, mean.high]).tolist()
    return Mean(value, low, high, mean.tokens, mean.rows)


def mcnemar(one: Bool[np.ndarray, " prompts"], other: Bool[np.ndarray, " prompts"]) -> float:
    """Exact two-sided p of McNemar's test on the prompts whose outcomes differ; 1 if none does."""
    wins, losses = int((one & ~other).sum()), int((other & ~one).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def outcome_matrix(outcomes: Sequence[str], outcome: str = "compliance") -> Bool[np.ndarray, "fits prompts"]:
    """Mark the answers with an outcome, by its word or letter; a row a fit.

    Raises ReplibError if rows differ in length or are empty.
    """
    if not outcomes or len({len(text) for text in outcomes}) != 1 or not outcomes[0]:
        raise ReplibError(
            "Rows of outcomes are empty or differ in length: generate answers to the same prompts for every edit."
        )
    return np.array([[letter == outcome[0] for letter in text] for text in outcomes])


def newcombe(one: Bool[np.ndarray, " prompts"], other: Bool[np.ndarray, " prompts"]) -> tuple[float, float]:
    """95 % interval of the difference of two paired rates: Newcombe's tenth method (Statist. Med. 17, 2635, 1998).

    Wilson intervals of both, joined by their correlation.
    """
    p, q, n = one.mean(), other.mean(), len(one)
    (low_p, high_p), (low_q, high_q) = (wilson(int(x.sum()), n) for x in (one, other))
    both, none = int((one & other).sum()), int((~one & ~other).sum())
    cross = both * none - int((one & ~other).sum()) * int((other & ~one).sum())
    shared = max(cross - n / 2, 0) if cross > 0 else cross
    spread = np.sqrt(p * (1 - p) * q * (1 - q)) * n**2
    phi = shared / spread if spread else 0.0
    down, up = (np.sqrt(a**2 - 2 * phi * a * b + b**2) for a, b in ((p - low_p, high_q - q), (high_p - p, q - low_q)))
    return float(p - q - down), float(p - q + up)


def contrast(one: Bool[np.ndarray, "fits prompts"], other: Bool[np.ndarray, "fits prompts"]) -> dict[str, Any]:
    """Difference of two rates on the same prompts, and of the same fits if there are several.

    The interval of one fit is ``newcombe``, of several ``two_way_interval``; ``p`` is McNemar's, for one fit alone.
    """
    gap = one.astype(float) - other.astype(float)
    low, high = two_way_interval(gap)
    if len(gap) == 1 or low == high:  # fits that do not vary add no prompts
        low, high = newcombe(one[0], other[0])
    only = {"only_one": int((one & ~other).sum()), "only_other": int((other & ~one).sum())}
    size = {"n": gap.shape[1], "fits": len(gap)}
    p = mcnemar(one[0], other[0]) if len(gap) == 1 else float("nan")
    return only | size | {"difference": float(gap.mean()), "low": low, "high": high, "p": p}


def spearman(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    """Rank correlation, ties at their mean rank; NaN if either is constant."""
    varied = np.ptp(one) > 0 and np.ptp(other) > 0
    return float(spearmanr(one, other).statistic) if varied else float("nan")


def kl(log_p: Float[Tensor, "*batch n"], log_q: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """KL(p || q) over the last axis, in nats, from log probabilities, in their dtype.

    A category with p = 0 adds nothing; one with q = 0 < p makes it inf.
    """
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


Values = NDArray[np.floating[Any]]
Numbers = ArrayLike | Sequence[Any] | int | float  # input of numpy.asarray


@dataclass(frozen=True)
class Measured:
    """Estimates with intervals, sample sizes and places.

    Attributes:
        value: the estimates.
        low: lower ends of their intervals, in the shape of `value`.
        high: upper ends.
        n: cases behind each estimate, one number or an array.
        at: places on the horizontal axis; 0, 1, 2, … where None.
    """

    value: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    n: Numbers | None = None
    at: Numbers | None = None

    def words(self) -> NDArray[Any]:
        """Write every estimate as `0.42 [0.31, 0.55], n = 96`."""
        parts = [numbers(part, self.value).ravel().tolist() for part in (self.value, self.low, self.high, self.n)]
        texts = [_words(*row) for row in zip(*parts, strict=True)]
        return np.array(texts, dtype=np.str_).reshape(np.shape(self.value))


def numbers(given: Numbers | None, like: Numbers | None = None) -> Values:
    """Convert to float32 in the shape of `like`; None becomes NaN."""
    numbers = np.asarray(np.nan if given is None else given, np.float32)
    return numbers if like is None else np.broadcast_to(numbers, np.shape(like))


def _words(value: float, low: float, high: float, n: float) -> str:
    known = np.isfinite(low) and np.isfinite(high)
    text = interval_text(value, low, high, ".3g", " ") if known else f"{value:.3g}"
    return text + (f", n = {int(n)}" if np.isfinite(n) else "")
