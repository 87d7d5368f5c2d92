"""Streamed moments against NumPy and scikit-learn, whatever the pieces were."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from replib.core.errors import ReplibError
from replib.transport.gaussians import Moments


def cloud(n, dim, seed=0, offset=50.0):
    """Two layers of correlated vectors far from the origin, of falling variance."""
    g = torch.Generator().manual_seed(seed)
    scales = torch.logspace(1, -2, dim)
    mix = torch.linalg.qr(torch.randn(dim, dim, generator=g))[0]
    return torch.randn(2, n, dim, generator=g) * scales @ mix + offset


def fed(x, sizes, rank):
    moments = Moments(rank)
    for piece in x.split(sizes, dim=1):
        moments.update(piece)
    return moments


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6), dim=st.integers(2, 40))
def test_mean_and_covariance_equal_numpys_however_the_vectors_are_cut(sizes, dim):
    x = cloud(sum(sizes) + 2, dim)
    moments = fed(x, [*sizes, 2], rank=500)
    for layer in range(2):
        expected = np.cov(x[layer].double().numpy(), rowvar=False)
        found = moments.factor[layer].mT @ moments.factor[layer]
        np.testing.assert_allclose(found, expected, atol=1e-9 * np.trace(expected))
        np.testing.assert_allclose(moments.mean[layer], x[layer].double().mean(0), rtol=1e-12)
        assert moments.variance[layer].item() == pytest.approx(np.trace(expected), rel=1e-9)
    assert (moments.lost < 1e-9).all()


def test_a_rank_as_large_as_the_width_loses_nothing_of_any_number_of_vectors():
    moments = fed(cloud(5000, 16), 512, rank=16)
    assert moments.factor.shape == (2, 16, 16) and (moments.lost < 1e-9).all()


def test_axes_equal_scikit_learns_pca():
    x = cloud(400, 24)
    axes, variances = fed(x, 100, rank=24).pca(5)
    oracle = PCA(5, svd_solver="full").fit(x[1].double().numpy())
    np.testing.assert_allclose(variances[1], oracle.explained_variance_, rtol=1e-6)
    cosines = np.abs((axes[1].numpy() * oracle.components_).sum(1))
    np.testing.assert_allclose(cosines, 1, atol=1e-6)
    assert (axes.gather(-1, axes.abs().argmax(-1, keepdim=True)) > 0).all()


def test_a_small_rank_keeps_the_large_axes_and_says_what_it_lost():
    x = cloud(3000, 64)
    moments = fed(x, 256, rank=24)
    truth = torch.linalg.eigvalsh(torch.from_numpy(np.cov(x[0].double().numpy(), rowvar=False))).flip(0)
    _, variances = moments.pca(4)
    torch.testing.assert_close(variances[0], truth[:4], rtol=1e-3, atol=0)
    assert moments.factor.shape == (2, 24, 64)
    assert truth[24:].sum() / truth.sum() <= moments.lost[0] <= 2 * truth[24:].sum() / truth.sum()


def test_without_a_rank_only_mean_and_variance_are_kept():
    x = cloud(100, 8)
    moments = fed(x, 30, rank=0)
    torch.testing.assert_close(moments.variance, x.double().var(dim=1).sum(-1))
    with pytest.raises(ReplibError, match=r"rank="):
        _ = moments.factor


def test_what_is_not_defined_is_refused():
    with pytest.raises(ReplibError, match="0 vectors are not defined"):
        _ = Moments().mean
    with pytest.raises(ReplibError, match="at least 2"):
        _ = Moments(3).update(cloud(1, 4)).variance
    with pytest.raises(ReplibError, match="9 axes exceed the 4 held"):
        Moments(4).update(cloud(50, 8)).pca(9)
    with pytest.raises(ReplibError, match="one model only"):
        Moments().update(cloud(5, 4)).update(cloud(5, 6))
