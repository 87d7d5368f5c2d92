"""Edits on the same prompts against each other, and rates over several fits: differences with their intervals.

Outcomes are a letter an answer, as ``Sweeper.table`` keeps them: r(efusal), c(ompliance), d(egenerate).
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
    """Interval of the mean over trainings and prompts, for other seeds and other prompts than these.

    mean ± t sqrt(s_r²/seeds + s_c²/prompts): variances of the means of rows and of columns, t with the degrees of
    freedom of Welch and Satterthwaite. What is left beside both is counted in each, so that it is rather too wide.
    Of one seed, prompts alone vary. The formula of all comparisons of trained models; for a rate see ``two_way_rate_interval``.
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
    """``crossed`` within 0 and 1; where nothing varies, Wilson's for the prompts: further seeds are no more prompts."""
    low, high = two_way_interval(values)
    if low == high:
        return wilson(round(low * values.shape[1]), values.shape[1])
    return max(0.0, low), min(1.0, high)


DRAWS = 1000


class Mean(NamedTuple):
    """A mean over tokens."""

    value: float
    low: float
    """Of its 95 % interval for other rows than these."""
    high: float
    tokens: int
    rows: int


def mean_over(values: Float[Tensor, " tokens"], row: Int[Tensor, " tokens"], *, seed: int = 0) -> Mean:
    """Mean over tokens; the 95 % interval is the bootstrap's over rows, by percentiles (1000 draws)."""
    _, place = row.unique(return_inverse=True)
    counts = torch.bincount(place).double()
    sums = torch.zeros_like(counts).index_add(0, place, values.double())
    drawn = torch.randint(len(counts), (DRAWS, len(counts)), generator=torch.Generator().manual_seed(seed))
    means = (sums[drawn].sum(1) / counts[drawn].sum(1)).numpy()
    low, high = np.quantile(means, [0.025, 0.975])
    return Mean(float(sums.sum() / counts.sum()), float(low), float(high), len(values), len(counts))


def perplexity(nats: Float[Tensor, " tokens"], row: Int[Tensor, " tokens"], *, seed: int = 0) -> Mean:
    """The exponential of ``mean_over`` of −log p; of differences of −log p, the factor between two perplexities."""
    mean = mean_over(nats, row, seed=seed)
    value, low, high = np.exp([mean.value, mean.low, mean.high]).tolist()
    return Mean(value, low, high, mean.tokens, mean.rows)


def mcnemar(one: Bool[np.ndarray, " prompts"], other: Bool[np.ndarray, " prompts"]) -> float:
    """Exact two-sided p of McNemar's test: of the prompts on which two differ, does one win more than half?

    1 where they never differ.
    """
    wins, losses = int((one & ~other).sum()), int((other & ~one).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def outcome_matrix(outcomes: Sequence[str], outcome: str = "compliance") -> Bool[np.ndarray, "fits prompts"]:
    """Which answers had an outcome, a row a fit.

    Raises ReplibError where rows are of unlike length, or have no answers.
    """
    if not outcomes or len({len(text) for text in outcomes}) != 1 or not outcomes[0]:
        raise ReplibError("Edits can be paired on the same prompts alone, with answers to all of them: generate those.")
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
    """Difference of two rates on the same prompts, and of the same fits where there are several.

    Its interval is for other prompts (``newcombe``), of several fits for other fits too (``audit.crossed``). ``p`` is
    McNemar's, of one fit each alone.
    """
    gap = one.astype(float) - other.astype(float)
    low, high = two_way_interval(gap)
    if len(gap) == 1 or low == high:  # where fits do not vary, they are no more prompts
        low, high = newcombe(one[0], other[0])
    only = {"only_one": int((one & ~other).sum()), "only_other": int((other & ~one).sum())}
    size = {"n": gap.shape[1], "fits": len(gap)}
    p = mcnemar(one[0], other[0]) if len(gap) == 1 else float("nan")
    return only | size | {"difference": float(gap.mean()), "low": low, "high": high, "p": p}


def spearman(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    """Rank correlation, ties at their mean rank; NaN where one of the two does not vary."""
    varied = np.ptp(one) > 0 and np.ptp(other) > 0
    return float(spearmanr(one, other).statistic) if varied else float("nan")


def kl(log_p: Float[Tensor, "*batch n"], log_q: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """KL(p || q) over the last axis, in nats, from log probabilities, in their dtype.

    A category with p = 0 adds nothing; one with q = 0 < p makes it inf.
    """
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


Values = NDArray[np.floating[Any]]
Numbers = ArrayLike | Sequence[Any] | int | float  # whatever numpy.asarray turns into numbers


@dataclass(frozen=True)
class Measured:
    """A measured array with what is known about it.

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
    """Return `given` as single-precision numbers in the shape of `like`; NaN where nothing was given."""
    numbers = np.asarray(np.nan if given is None else given, np.float32)
    return numbers if like is None else np.broadcast_to(numbers, np.shape(like))


def _words(value: float, low: float, high: float, n: float) -> str:
    interval = f" [{low:.3g}, {high:.3g}]" if np.isfinite(low) and np.isfinite(high) else ""
    return f"{value:.3g}{interval}" + (f", n = {int(n)}" if np.isfinite(n) else "")
