"""Shrinkage weights against scikit-learn, which builds the whole covariance."""

import math

import pytest
import torch
from sklearn.covariance import OAS, LedoitWolf

from helpers.gaussians import normal, relative
from replib.core.errors import ReplibError
from replib.transport.gaussians import Gaussian, Moments, Shrunk, shrinkage


@pytest.mark.parametrize(("n", "d"), [(20, 60), (200, 15), (128, 700)])
def test_weights_are_those_of_scikit_learn(n, d):
    rows = normal(n, d) * torch.linspace(0.2, 2, d, dtype=torch.float64) + 1
    assert shrinkage(rows) == pytest.approx(LedoitWolf().fit(rows.numpy()).shrinkage_, rel=1e-11)
    assert shrinkage(rows, rule="oas") == pytest.approx(OAS().fit(rows.numpy()).shrinkage_, rel=1e-11)
    streamed = Moments(rank=n).update(rows[None]).gaussian(0)
    assert shrinkage(streamed, rule="oas") == pytest.approx(shrinkage(rows, rule="oas"), rel=1e-9)


def test_the_factor_of_a_shrunk_covariance_is_one():
    cloud, shrunk = Gaussian.of(normal(20, 6)), Shrunk(0.3, 0.7)
    found = shrunk.factor(cloud.factor)
    expected = 0.7 * cloud.factor.mT @ cloud.factor + 0.7 * torch.eye(6, dtype=torch.float64)
    assert relative(found.mT @ found, expected) < 1e-14


def test_unknown_rules_are_refused_and_equal_samples_are_all_floor():
    with pytest.raises(ReplibError, match="use one of ledoit_wolf, oas"):
        shrinkage(normal(9, 3), rule="none")
    assert math.isclose(shrinkage(torch.ones(5, 3)), 1.0)
