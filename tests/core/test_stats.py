"""Paired differences: exact p, intervals that hold what they promise, and fits beside prompts."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

from replib.ablation.sweep_report import compare_edits, over_fits
from replib.core.errors import ReplibError
from replib.core.stats import contrast, mcnemar, newcombe, outcome_matrix, spearman, two_way_interval, wilson


def pair(both, first, second, none):
    """Outcomes of two edits with these numbers of prompts on which both, one, the other, none comply."""
    one = np.array([1] * both + [1] * first + [0] * second + [0] * none, bool)
    other = np.array([1] * both + [0] * first + [1] * second + [0] * none, bool)
    return one, other


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (3, 3), (9, 2), (1, 12)])
def test_mcnemar_is_the_exact_binomial_of_the_discordant_prompts(wins, losses):
    one, other = pair(7, wins, losses, 4)
    n = wins + losses
    tail = 2 * binom.cdf(min(wins, losses), n, 0.5) if n else 1.0
    assert mcnemar(one, other) == pytest.approx(min(1.0, tail))
    assert mcnemar(one, other) == mcnemar(other, one)
    assert mcnemar(*pair(0, wins, losses, 0)) == mcnemar(one, other)  # where both agree, nothing is learned


def test_the_interval_of_a_difference_is_antisymmetric_and_holds_it():
    for counts in ((36, 12, 2, 0), (0, 5, 5, 20), (10, 0, 0, 10), (0, 20, 0, 0), (20, 0, 0, 0)):
        one, other = pair(*counts)
        low, high = newcombe(one, other)
        assert newcombe(other, one) == pytest.approx((-high, -low))
        assert -1 <= low <= one.mean() - other.mean() <= high <= 1 and low < high


def test_against_a_rate_that_cannot_vary_the_interval_is_wilsons_joined():
    """Without correlation the two Wilson intervals add in squares."""
    one, other = pair(0, 12, 0, 18)
    (low, _), (_, top) = wilson(12, 30), wilson(0, 30)
    assert newcombe(one, other)[0] == pytest.approx(0.4 - math.hypot(0.4 - low, top - 0.0))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    shares = [0.35, 0.3, 0.1, 0.25]
    hits = 0
    for _ in range(400):
        low, high = newcombe(*pair(*rng.multinomial(40, shares)))
        hits += low <= 0.2 <= high
    assert 0.92 <= hits / 400 <= 0.99


def test_one_fit_has_mcnemar_and_several_have_an_interval_over_both():
    one, other = np.array([[1, 1, 0, 1], [1, 0, 0, 1]], bool), np.array([[0, 1, 0, 0], [0, 0, 0, 1]], bool)
    single = contrast(one[:1], other[:1])
    assert (single["only_one"], single["only_other"], single["n"], single["fits"]) == (2, 0, 4, 1)
    assert single["p"] == 0.5 and (single["low"], single["high"]) == newcombe(one[0], other[0])
    both = contrast(one, other)
    assert math.isnan(both["p"]) and both["difference"] == pytest.approx(3 / 8)
    assert (both["low"], both["high"]) == two_way_interval(one.astype(float) - other)


def test_every_two_edits_of_a_table_once():
    rows = [("rfa", "ccr"), ("ace", "crr"), ("act", "ddd")]
    table = pd.DataFrame([{"method": m, "outcomes": x, "scored": "h"} for m, x in rows])
    found = compare_edits(table, "method")
    assert (found.one + "-" + found.other).tolist() == ["rfa-ace", "rfa-act", "ace-act"]
    assert found.difference.tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 3])
    with pytest.raises(ReplibError, match="scored on different prompts"):
        compare_edits(table.assign(scored=["h", "h", "g"]), "method")
    with pytest.raises(ReplibError, match="fitted another number of times"):
        compare_edits(pd.concat([table, table[:1]]), "method")


def test_edits_without_answers_cannot_be_paired():
    with pytest.raises(ReplibError, match="generate answers to the same prompts"):
        outcome_matrix(["", ""])
    with pytest.raises(ReplibError, match="generate answers to the same prompts"):
        outcome_matrix(["ccr", "cc"])
    assert outcome_matrix(["rcd"], "degenerate").tolist() == [[False, False, True]]


def test_a_rate_over_fits_is_wider_than_of_one_and_no_narrower_for_equal_fits():
    rows = lambda *texts: pd.DataFrame([{"method": "rfa", "read": None, "outcomes": x} for x in texts])  # noqa: E731
    (varied,) = over_fits(rows("ccccrrrr", "ccccccrr", "ccrrrrrr"), "method", "read").itertuples()
    assert (varied.fits, varied.n, varied.compliance) == (3, 8, 0.5)
    assert (varied.least, varied.most) == (0.25, 0.75) and varied.low < 0.5 < varied.high
    (equal,) = over_fits(rows("cccccccc", "cccccccc", "cccccccc"), "method", "read").itertuples()
    assert (equal.low, equal.high) == pytest.approx(wilson(8, 8))


@pytest.mark.parametrize(
    ("one", "other", "rho"),
    [
        ([1, 2, 3, 4], [1, 3, 2, 4], 1 - 6 * 2 / (4 * 15)),  # 1 - 6 sum of squared differences / n (n^2 - 1)
        ([1, 2, 3, 4], [10, 20, 1000, 30], 0.8),  # values do not matter
        ([1, 2, 3, 4], [9, 7, 5, 3], -1),
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / (4.5 * 5) ** 0.5),  # ranks 1, 2.5, 2.5, 4, so squares 4.5 and 5
        ([5, 5, 5, 5], [1, 2, 3, 4], math.nan),
        ([1, 2, 3, 4], [0, 0, 0, 0], math.nan),
    ],
)
def test_rank_correlation_is_that_of_ranks_worked_out_by_hand(one, other, rho):
    assert spearman(np.array(one, float), np.array(other, float)) == pytest.approx(rho, nan_ok=True)
