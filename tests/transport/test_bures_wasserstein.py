"""Bures-Wasserstein distances against POT and against known truth, their bias, and their null."""

import math

import ot
import pytest
import torch

from helpers.gaussians import classes, normal
from replib.core.errors import ReplibError
from replib.transport.bures_wasserstein import bures_wasserstein, bures_wasserstein_debiased, bures_wasserstein_null
from replib.transport.gaussians import Gaussian, Moments, span_coordinates


@pytest.mark.parametrize(("n", "m", "d"), [(60, 45, 12), (20, 30, 50)])
def test_bures_wasserstein_agrees_with_pot(n, m, d):
    x, y = classes(n, m, d)
    ridge = 1e-9 * torch.eye(d, dtype=torch.float64)  # POT takes roots of the covariances
    oracle = ot.gaussian.bures_wasserstein_distance(x.mean(0), y.mean(0), x.mT.cov() + ridge, y.mT.cov() + ridge)
    parts = bures_wasserstein(x, y)
    assert parts.total == pytest.approx(float(oracle) ** 2, rel=1e-4 if n < d else 1e-8)
    assert parts.total == parts.mean + parts.covariance
    assert bures_wasserstein(y, x).total == pytest.approx(parts.total, rel=1e-12)


def test_bures_of_near_equal_clouds_does_not_cancel():
    x = classes()[0]
    centred = x - x.mean(0)
    scaled = x.mean(0) + centred * (1 + 1e-9)
    exact = 1e-18 * float(x.var(0).sum())
    assert bures_wasserstein(x, scaled).covariance == pytest.approx(exact, rel=1e-4)
    assert abs(trace_form(x, scaled) - exact) > exact  # the textbook form has no digit left


def trace_form(x, y):
    factors = [(rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (x, y)]
    squares = sum(float(f.square().sum()) for f in factors)
    return squares - 2 * float(torch.linalg.svdvals(factors[1] @ factors[0].mT).sum())


def test_debiased_distance_is_near_zero_without_a_difference_and_near_the_truth_with_one():
    d, n = 200, 64
    deviations = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    x, y = normal(n, d) * deviations, normal(n, d, seed=1) * deviations
    total = float(deviations.square().sum())
    assert bures_wasserstein(x, y).covariance > 0.3 * total  # nothing but bias
    null = bures_wasserstein_debiased(x, y)
    assert abs(null.covariance) < 0.05 * total
    assert abs(null.mean) < 0.05 * total
    stretched = y.clone()
    stretched[:, 0] *= 3
    truth = (3 - 1) ** 2 * 1.0
    apart = bures_wasserstein_debiased(x, stretched + 0.5)
    assert apart.covariance == pytest.approx(truth, rel=0.35)
    assert apart.mean == pytest.approx(0.25 * d, rel=0.05)


def test_debiased_distance_repeats_with_its_seed():
    x, y = classes()
    assert bures_wasserstein_debiased(x, y, seed=3) == bures_wasserstein_debiased(x, y, seed=3)
    assert bures_wasserstein_debiased(x, y, seed=3) != bures_wasserstein_debiased(x, y, seed=4)


def test_span_coordinates_are_an_isometry():
    x, y = classes(14, 11, 40)
    small = span_coordinates(x, y)
    assert small[0].shape == (14, 25)
    assert torch.allclose(torch.cdist(*small), torch.cdist(x, y))
    assert bures_wasserstein(*small).total == pytest.approx(bures_wasserstein(x, y).total, rel=1e-12)


def test_a_stream_with_a_gap_in_it_is_refused():
    rows = classes()[0].clone()
    rows[3, 3] = math.nan
    with pytest.raises(ReplibError, match="NaN or inf"):
        Gaussian(rows[3], rows, 60)


def test_streamed_clouds_are_as_far_apart_as_their_samples():
    x, y = classes()
    streamed = [Moments(rank=64).update(rows[None]).gaussian(0) for rows in (x, y)]
    assert bures_wasserstein(*streamed) == pytest.approx(bures_wasserstein(x, y), rel=1e-10)
    assert bures_wasserstein(Gaussian.of(x), y) == bures_wasserstein(x, y)


# ------------------------------------------------------------------------------------ null
def sampled(stretch=1.0, shift=0.0, d=60, n=40, seed=0):
    deviations = torch.arange(1, d + 1, dtype=torch.float64) ** -0.5
    x, y = normal(n, d, seed=seed) * deviations, normal(n + 6, d, seed=seed + 1) * deviations
    y[:, 0] *= stretch
    y[:, 1] += shift
    return x, y


def test_null_tells_a_gap_of_the_means_from_one_of_the_covariances():
    alike, moved, wide = (
        bures_wasserstein_null(*sampled(**change)).p_value for change in ({}, {"shift": 2.0}, {"stretch": 4.0})
    )
    assert min(alike) > 0.05
    assert moved.mean == moved.total == pytest.approx(1 / 101) and moved.covariance > 0.05
    assert wide.covariance == pytest.approx(1 / 101) and wide.mean > 0.05


def test_null_less_its_bias_is_comparable_to_the_debiased_distance():
    x, y = sampled(stretch=4.0, shift=2.0, n=80)
    null, debiased = bures_wasserstein_null(x, y), bures_wasserstein_debiased(x, y)
    assert null.value == bures_wasserstein(*span_coordinates(x, y))
    assert null.value.mean - null.centre.mean == pytest.approx(debiased.mean, rel=0.02)
    assert null.value.covariance - null.centre.covariance == pytest.approx(debiased.covariance, rel=0.35)
    assert all(low < centre < high for low, centre, high in zip(null.low, null.centre, null.high, strict=True))


def test_p_values_without_a_difference_are_spread_over_the_interval():
    found = [bures_wasserstein_null(*sampled(d=30, n=20, seed=10 * i), permutations=39).p_value for i in range(40)]
    for part in ("mean", "covariance", "total"):
        values = torch.tensor([getattr(p, part) for p in found])
        assert 0.3 < values.mean() < 0.7
        assert (values <= 0.1).double().mean() <= 0.25


def test_null_repeats_with_its_seed_and_does_not_turn_with_the_space():
    x, y = sampled()
    assert bures_wasserstein_null(x, y, seed=3) == bures_wasserstein_null(x, y, seed=3)
    assert bures_wasserstein_null(x, y, seed=3).high != bures_wasserstein_null(x, y, seed=4).high
    assert bures_wasserstein_null(x + 5, y + 5).p_value == bures_wasserstein_null(x, y).p_value


def test_too_few_samples_and_unlike_widths_are_refused():
    with pytest.raises(ReplibError, match="at least two prompts"):
        bures_wasserstein(normal(1, 3), normal(5, 3))
    with pytest.raises(ReplibError, match="needs 4 a class"):
        bures_wasserstein_debiased(normal(3, 3), normal(5, 3))
    with pytest.raises(ReplibError, match="needs 4 a class"):
        bures_wasserstein_null(normal(3, 3), normal(5, 3))
    with pytest.raises(ReplibError, match="0 permutations"):
        bures_wasserstein_null(normal(5, 3), normal(5, 3), permutations=0)
    with pytest.raises(ReplibError, match="widths 3 and 4; capture both at one site"):
        bures_wasserstein_debiased(normal(5, 3), normal(5, 4))
