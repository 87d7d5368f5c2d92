"""Relative transport gaps and label-free features: their units, their invariances, and known truths."""

import numpy as np
import pytest
import torch

from replib.ablation.localisation import block_features
from replib.analysis.profile import layer_profile, relative_gaps


def clouds(n=200, d=12, shift=0.0, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))
    x = x * scale
    x[:, 0] += shift
    return x, y


def gaps(*pairs, permutations=1):
    x, y = (torch.stack(side) for side in zip(*pairs, strict=True))
    return relative_gaps(layer_profile(x, y, permutations=permutations, splits=4))


def test_gaps_are_in_units_of_the_spread():
    """A shift by a and scales s and 1 of d coordinates have parts a² and d (s - 1)², over d (s² + 1) / 2."""
    table = gaps(clouds(n=600, shift=3.0), clouds(n=600, scale=2.0))
    value = table.set_index(["layer", "part"]).value
    assert value[0, "mean"] == pytest.approx(9 / 12, rel=0.15)
    assert value[1, "covariance"] == pytest.approx(1 / 2.5, rel=0.15)
    assert abs(value[0, "covariance"]) < 0.04 and abs(value[1, "mean"]) < 0.04


def test_equal_classes_stay_inside_their_null():
    table = gaps(*(clouds(n=40, seed=seed) for seed in range(6)), permutations=40)
    inside = (table.low <= table.value) & (table.value <= table.high)
    assert inside.mean() > 0.7 and (table.p > 0.02).mean() > 0.7


def test_scaling_and_turning_both_classes_changes_no_gap():
    x, y = clouds(n=60, shift=2.0, scale=1.5)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    one, other = (gaps((a, b), permutations=20) for a, b in ((x, y), (7 * x @ turn, 7 * y @ turn)))
    np.testing.assert_allclose(one[["value", "low", "high"]], other[["value", "low", "high"]], rtol=1e-5, atol=1e-8)


def test_features_keep_to_scale_and_know_a_mere_shift():
    x, _ = clouds(n=400)
    y = x - 3 * torch.eye(12, dtype=x.dtype)[0]
    found = block_features(x, y, (0.7, 0.0), depth=0.5)
    again = block_features(5 * x, 5 * y, (0.7, 0.0), depth=0.5)
    np.testing.assert_allclose(found, again, rtol=1e-4, atol=1e-6)
    assert found.depth == 0.5 and found.mean_gap == 0.7
    assert found.rho > 0.95 and found.gain < 1e-6  # equal covariances: nothing is stretched
    assert found.cost == pytest.approx(9 * found.rho / float(x.var(0).sum()), rel=1e-6)


def test_the_effective_rank_counts_directions():
    x, y = clouds(n=800)
    assert block_features(x, y + 1, (0.0, 0.0), depth=0.0).rank == pytest.approx(12, rel=0.05)
    line = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None] * torch.ones(1, 6, dtype=torch.float64)
    assert block_features(
        line, line + torch.eye(6, dtype=line.dtype)[0], (0.0, 0.0), depth=0.0, k=1
    ).rank == pytest.approx(1)


@pytest.mark.parametrize("n", [4, 50])
def test_the_mahalanobis_gap_is_that_of_the_dense_formula(n):
    """Also with fewer prompts than coordinates; its ridge is the mean variance within the classes."""
    x, y = clouds(n=n, shift=2.0, scale=1.5)
    gap = x.mean(0) - y.mean(0)
    within = ((n - 1) * (x.mT.cov() + y.mT.cov())) / (2 * n - 2)
    dense = within + within.trace() / 12 * torch.eye(12, dtype=x.dtype)
    expected = float(gap @ torch.linalg.solve(dense, gap))
    assert block_features(x, y, (0.0, 0.0), depth=0.0).mahalanobis == pytest.approx(expected, rel=1e-5)
