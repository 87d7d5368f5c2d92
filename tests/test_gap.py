"""Relative transport gaps and label-free features: their units, their invariances, and known truths."""

import numpy as np
import pytest
import torch

from replib.gap import Features, features, relative_gaps
from replib.geometry import layer_profile


def clouds(n=200, d=12, shift=0.0, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2))
    x = x * scale
    x[:, 0] += shift
    return x, y


def gaps(*pairs):
    x, y = (torch.stack(side) for side in zip(*pairs, strict=True))
    return relative_gaps(layer_profile(x, y, permutations=40, splits=8))


def test_gaps_are_in_units_of_the_spread():
    """A shift by a and scales s and 1 of d coordinates have parts a² and d (s - 1)², over d (s² + 1) / 2."""
    table = gaps(clouds(n=2000, shift=3.0), clouds(n=2000, scale=2.0))
    value = table.set_index(["layer", "part"]).value
    assert value[0, "mean"] == pytest.approx(9 / 12, rel=0.1)
    assert value[1, "covariance"] == pytest.approx(1 / 2.5, rel=0.1)
    assert abs(value[0, "covariance"]) < 0.02 and abs(value[1, "mean"]) < 0.02


def test_equal_classes_stay_inside_their_null():
    table = gaps(*(clouds(n=60, seed=seed) for seed in range(6)))
    inside = (table.low <= table.value) & (table.value <= table.high)
    assert inside.mean() > 0.7 and (table.p > 0.02).mean() > 0.7


def test_scaling_and_turning_both_classes_changes_no_gap():
    x, y = clouds(shift=2.0, scale=1.5)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    one, other = (gaps((a, b)) for a, b in ((x, y), (7 * x @ turn, 7 * y @ turn)))
    np.testing.assert_allclose(one[["value", "low", "high"]], other[["value", "low", "high"]], atol=1e-9)


def test_features_keep_to_scale_and_know_a_mere_shift():
    x, _ = clouds(n=400)
    y = x - 3 * torch.eye(12, dtype=x.dtype)[0]
    found = features(x, y, (0.7, 0.0), depth=0.5)
    again = features(5 * x, 5 * y, (0.7, 0.0), depth=0.5)
    np.testing.assert_allclose(found, again, rtol=1e-4, atol=1e-6)
    assert found.depth == 0.5 and found.mean_gap == 0.7
    assert found.rho > 0.95 and found.gain < 1e-6  # equal covariances: nothing is stretched
    assert found.cost == pytest.approx(9 * found.rho / float(x.var(0).sum()), rel=1e-6)


def test_the_effective_rank_counts_directions():
    x, y = clouds(n=4000)
    assert features(x, y + 1, (0, 0), depth=0).rank == pytest.approx(12, rel=0.02)
    line = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None] * torch.ones(1, 6, dtype=torch.float64)
    assert features(line, line + torch.eye(6, dtype=line.dtype)[0], (0, 0), depth=0, k=1).rank == pytest.approx(1)


def test_the_mahalanobis_gap_ignores_a_direction_that_only_one_class_lacks():
    """Of a shift along an axis of deviation s it is about shift² / (s² + ridge)."""
    g = torch.Generator().manual_seed(0)
    spread = torch.tensor([4.0, 0.5, 1.0], dtype=torch.float64)
    x, y = (torch.randn(4000, 3, generator=g, dtype=torch.float64) * spread for _ in range(2))
    shift = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    wide = features(x + shift, y, (0, 0), depth=0).mahalanobis
    narrow = features(x + shift[[1, 0, 2]], y, (0, 0), depth=0).mahalanobis
    ridge = float((spread**2).mean())
    assert wide == pytest.approx(1 / (16 + ridge), rel=0.15) and narrow == pytest.approx(1 / (0.25 + ridge), rel=0.15)
    assert set(Features._fields) >= {"mahalanobis", "rank", "gain", "cost"}
