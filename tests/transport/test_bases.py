"""The axes a map works in: those of scikit-learn's PCA, and what each reading sees that another misses."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from helpers.gaussians import massive, normal, relative
from replib.transport.bases import BASES, pooled_rows, share_inside
from replib.transport.gaussians import Gaussian, cloud_pair, principal_axes


@pytest.mark.parametrize(("n", "d"), [(30, 100), (100, 30)])
def test_axes_and_signs_are_those_of_scikit_learn(n, d):
    rows = normal(n, d) * torch.linspace(1, 3, d, dtype=torch.float64)
    axes, energy = principal_axes(rows - rows.mean(0), 3)
    oracle = PCA(3, svd_solver="full").fit(rows.numpy())
    assert np.allclose(axes.mT, oracle.components_, atol=1e-9)
    assert np.allclose(energy[:3] / (n - 1), oracle.explained_variance_)


def test_pooled_axes_are_those_of_both_classes_in_one_pool():
    x, y = normal(40, 30) * 2, normal(25, 30, seed=1) + 1
    axes = BASES["pooled"](*cloud_pair(x, y), 4)
    assert np.allclose(axes.mT, PCA(4, svd_solver="full").fit(torch.cat([x, y]).numpy()).components_, atol=1e-10)
    rows, pool = pooled_rows(*cloud_pair(x, y)), torch.cat([x, y])
    assert relative(rows.mT @ rows, (pool - pool.mean(0)).mT @ (pool - pool.mean(0))) < 1e-13


def test_a_basis_within_classes_misses_the_gap_that_the_pooled_one_sees():
    noise, gap = normal(80, 30) * 0.5, torch.zeros(30, dtype=torch.float64)
    gap[7] = 4.0
    harmful, harmless = noise[:40] + gap, noise[40:]
    means = harmless.mean(0) - harmful.mean(0)
    assert share_inside(BASES["pooled"](*cloud_pair(harmful, harmless), 1), means) > 0.95
    within, _ = principal_axes(torch.cat([harmful - harmful.mean(0), harmless - harmless.mean(0)]), 1)
    with pytest.warns(UserWarning, match="squared mean gap"):
        assert share_inside(within, means) < 0.1


def test_massive_coordinates_hide_the_gap_from_the_pooled_axes_alone():
    clouds = cloud_pair(*massive())
    gap = clouds[1].mean - clouds[0].mean
    with pytest.warns(UserWarning, match="mean_first"):
        assert share_inside(BASES["pooled"](*clouds, 2), gap) < 0.1
    axes = BASES["mean_first"](*clouds, 2)
    assert share_inside(axes, gap) >= 1 - 1e-12
    assert relative(axes.mT @ axes, torch.eye(2, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("basis", BASES)
def test_signs_do_not_depend_on_the_order_of_the_samples(basis):
    x, y = normal(40, 30) * 2, normal(25, 30, seed=1) + 1
    axes = BASES[basis](*cloud_pair(x, y), 3)
    assert relative(BASES[basis](*cloud_pair(x.flip(0), y[torch.randperm(25)]), 3), axes) < 1e-10


def test_a_cloud_is_its_samples_and_projects_with_them():
    x, axes = normal(40, 30), torch.linalg.qr(normal(30, 4, seed=1))[0]
    cloud = Gaussian.of(x)
    assert relative(cloud.factor.mT @ cloud.factor, x.mT.cov()) < 1e-14
    assert cloud.variance == pytest.approx(float(x.var(0).mean()))
    assert relative(cloud.onto(axes).samples("a test"), (x - x.mean(0)) @ axes) < 1e-13
