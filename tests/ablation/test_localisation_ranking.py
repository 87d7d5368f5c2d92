"""The order of edits: attack success, or how many prompts the first token turns, and then the gentlest. And ranks."""

import math

import numpy as np
import pandas as pd
import pytest

from replib.ablation.localisation import sweep_onset
from replib.ablation.sweep import best_of, ordered
from replib.core.errors import ReplibError
from replib.core.stats import spearman


def test_edits_that_turn_as_many_prompts_are_ordered_by_what_else_they_do():
    """A deeper log-odds of an edit that has turned all prompts is no more success."""
    table = pd.DataFrame({"turned": [1, 1, 0.5, 1], "log_odds": [-30, -5, -1, -20], "kl": [9, 0.1, 0, 2]})
    assert ordered(table, "cheap").index.tolist() == [1, 3, 0, 2]
    assert ordered(table, "log_odds").index.tolist() == [0, 3, 1, 2]


def test_where_none_is_turned_the_nearest_comes_first():
    table = pd.DataFrame({"turned": [0.0, 0, 0.1], "log_odds": [5, 1, 4], "kl": [0, 3, 2]})
    assert ordered(table, "cheap").index.tolist() == [2, 1, 0]


def test_the_best_of_equals_is_the_gentlest():
    table = pd.DataFrame({"model": ["a", "a", "a", "b"], "compliance": [0.9, 1, 1, 0], "kl": [0, 3, 2, 1]})
    assert best_of(table, "model").kl.tolist() == [2, 1]


def test_a_group_without_a_name_is_a_group_and_what_is_not_known_is_left_out():
    table = pd.DataFrame({"read": [None, None, 0], "compliance": [0.1, 0.9, math.nan], "kl": [0, 3, 2]})
    assert best_of(table, "read").compliance.tolist() == [0.9]
    with pytest.raises(ReplibError, match="not ordered by 'kl'"):
        ordered(table, "kl")


def test_the_onset_is_the_first_block_of_half_the_best_and_none_without_success():
    table = pd.DataFrame({"layer": [0, 1, 1, 2], "compliance": [0.1, 0.2, 0.5, 0.9]})
    assert sweep_onset(table) == 1 and sweep_onset(table, 0.9) == 2
    assert sweep_onset(table[:2]) is None and sweep_onset(table.assign(compliance=math.nan)) is None


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
