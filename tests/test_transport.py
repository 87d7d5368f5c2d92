"""Gaussian transport: theorems of the map, oracles for each number, and the known ways to get it wrong."""

import math

import mpmath
import numpy as np
import ot
import pytest
import torch
from sklearn.covariance import OAS, LedoitWolf
from sklearn.decomposition import PCA

from replib.errors import ReplibError
from replib.transport import (
    GaussianMap,
    bures_wasserstein,
    bures_wasserstein_debiased,
    monge_scale,
    principal_axes,
    shrinkage,
    span_coordinates,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conditioned(k, condition, seed=0):
    """A factor F, [3k, k], whose covariance F^T F has the given condition number."""
    left = torch.linalg.qr(normal(3 * k, k, seed=seed))[0]
    right = torch.linalg.qr(normal(k, k, seed=seed + 1))[0]
    return left * torch.logspace(0, -math.log10(condition) / 2, k, dtype=torch.float64) @ right


def classes(n=60, m=45, d=12, seed=0):
    """Harmful and harmless clouds with a gap, unlike covariances and one axis that dominates."""
    mix = torch.linalg.qr(normal(d, d, seed=seed))[0] * torch.logspace(0.5, -1, d, dtype=torch.float64)
    harmful = normal(n, d, seed=seed + 1) @ mix.mT
    harmless = normal(m, d, seed=seed + 2) @ (mix @ torch.diag(torch.linspace(0.5, 2, d, dtype=torch.float64))).mT
    return harmful + 5 * mix[:, 1] + 3, harmless + 3


def relative(a, b):
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------ the scale A
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e8, 1e10])
def test_scale_pushes_the_source_covariance_onto_the_target(condition):
    source, target = conditioned(8, condition), conditioned(8, condition, seed=5)
    a = monge_scale(source, target)
    assert relative(a @ (source.mT @ source) @ a, target.mT @ target) < 1e-12
    assert torch.equal(a, a.mT)
    assert torch.linalg.eigvalsh(a).min() > 0


@pytest.mark.parametrize(("condition", "tolerance"), [(1e4, 1e-12), (1e8, 1e-9), (1e10, 1e-7)])
def test_scale_agrees_with_fifty_digits(condition, tolerance):
    source, target = conditioned(4, condition), conditioned(4, condition, seed=5)
    with mpmath.workdps(50):
        s, t = (mpmath.matrix(f.tolist()).T * mpmath.matrix(f.tolist()) for f in (source, target))
        root = symmetric_root(s)
        inverse = mpmath.inverse(root)
        exact = inverse * symmetric_root(root * t * root) * inverse
    exact = torch.tensor([[float(exact[i, j]) for j in range(4)] for i in range(4)], dtype=torch.float64)
    assert relative(monge_scale(source, target), exact) < tolerance


def symmetric_root(matrix):
    values, vectors = mpmath.eigsy(matrix)
    return vectors * mpmath.diag([mpmath.sqrt(v) for v in values]) * vectors.T


@pytest.mark.parametrize("condition", [1e2, 1e5])
def test_scale_in_float32_keeps_float32_accuracy(condition):
    source, target = conditioned(8, condition).float(), conditioned(8, condition, seed=5).float()
    a = monge_scale(source, target)
    assert a.dtype == torch.float32
    pushed = a.double() @ (source.mT.double() @ source.double()) @ a.double()
    assert relative(pushed, target.mT.double() @ target.double()) < 1e-5


def test_scale_of_a_distribution_onto_itself_is_the_identity_and_onto_a_multiple_is_the_multiple():
    source = conditioned(6, 1e4)
    rotated = torch.linalg.qr(normal(18, 18, seed=3))[0] @ source  # another factor of the same covariance
    identity = torch.eye(6, dtype=torch.float64)
    assert relative(monge_scale(source, rotated), identity) < 1e-11
    assert relative(monge_scale(source, 3 * rotated), 3 * identity) < 1e-11


def test_scale_there_and_back_is_the_identity():
    source, target = conditioned(6, 1e4), conditioned(6, 1e4, seed=5)
    there_and_back = monge_scale(target, source) @ monge_scale(source, target)
    assert relative(there_and_back, torch.eye(6, dtype=torch.float64)) < 1e-10


def test_scale_of_commuting_covariances_is_the_ratio_of_deviations():
    axes = torch.linalg.qr(normal(5, 5))[0]
    a, b = torch.logspace(0, -2, 5, dtype=torch.float64), torch.logspace(-1, 1, 5, dtype=torch.float64)
    exact = axes @ torch.diag(b / a) @ axes.mT
    assert relative(monge_scale(a[:, None] * axes.mT, b[:, None] * axes.mT), exact) < 1e-12


def test_scale_turns_with_the_space_and_its_determinant_is_the_ratio_of_volumes():
    source, target = conditioned(6, 1e4), conditioned(6, 1e4, seed=5)
    rotation = torch.linalg.qr(normal(6, 6, seed=9))[0]
    a = monge_scale(source, target)
    assert relative(monge_scale(source @ rotation.mT, target @ rotation.mT), rotation @ a @ rotation.mT) < 1e-10
    volumes = torch.logdet(target.mT @ target) - torch.logdet(source.mT @ source)
    assert float(torch.logdet(a)) == pytest.approx(float(volumes) / 2, abs=1e-9)


def test_cholesky_in_place_of_the_symmetric_root_is_not_a_transport():
    source, target = conditioned(6, 1e3), conditioned(6, 1e3, seed=5)
    s, t = source.mT @ source, target.mT @ target
    lower = torch.linalg.cholesky(s)
    values, vectors = torch.linalg.eigh(lower @ t @ lower.mT)
    inverse = torch.linalg.inv(lower)
    wrong = inverse @ (vectors * values.clamp_min(0).sqrt() @ vectors.mT) @ inverse
    assert relative(wrong @ s @ wrong, t) > 0.1
    assert relative(monge_scale(source, target), wrong) > 0.1


# ------------------------------------------------------------------------------------ the map T
def test_transported_samples_take_on_mean_and_covariance_of_the_target_and_keep_the_complement():
    harmful, harmless = classes()
    t = GaussianMap.fit(harmful, harmless, k=3, ridge=0.0)
    moved = t(harmful)
    inside, wanted = moved @ t.basis, harmless @ t.basis
    assert torch.allclose(inside.mean(0), wanted.mean(0), atol=1e-12)
    assert relative(inside.mT.cov(), wanted.mT.cov()) < 1e-12
    outside = torch.eye(12, dtype=torch.float64) - t.basis @ t.basis.mT
    assert ((moved - harmful) @ outside).abs().max() < 1e-12


def test_agrees_with_pot_in_the_whole_space():
    harmful, harmless = classes()
    t = GaussianMap.fit(harmful, harmless, k=12, ridge=0.0)
    means = harmful.mean(0), harmless.mean(0)
    covariances = harmful.mT.cov(), harmless.mT.cov()
    a, b = ot.gaussian.bures_wasserstein_mapping(*means, *covariances)
    assert relative(t(harmful), harmful @ a + b) < 1e-10


def test_whole_span_with_ridge_is_the_dense_ridge_map():
    harmful, harmless = classes(n=14, m=11, d=40)
    t = GaussianMap.fit(harmful, harmless, k=None, ridge=0.5)
    rank = t.basis.shape[1]
    assert rank == 14 + 11 - 1
    covariances = harmful.mT.cov(), harmless.mT.cov()
    ridge = 0.5 * (covariances[0].trace() + covariances[1].trace()) / (2 * rank) * torch.eye(40, dtype=torch.float64)
    a, b = ot.gaussian.bures_wasserstein_mapping(
        harmful.mean(0), harmless.mean(0), covariances[0] + ridge, covariances[1] + ridge
    )
    x = normal(5, 40, seed=8)
    assert relative(t(x), x @ a + b) < 1e-10


def test_one_axis_scales_by_the_ratio_of_deviations():
    harmful, harmless = classes()
    t = GaussianMap.fit(harmful, harmless, k=1, ridge=0.0)
    ratio = (harmless @ t.basis).std() / (harmful @ t.basis).std()
    assert float(t.scale) == pytest.approx(float(ratio), rel=1e-12)


def test_cost_is_the_squared_distance_and_the_geodesic_is_uniform():
    harmful, harmless = classes()
    t = GaussianMap.fit(harmful, harmless, k=3, ridge=0.0)
    inside = bures_wasserstein(harmful @ t.basis, harmless @ t.basis)
    assert t.cost == pytest.approx(inside.total, rel=1e-11)
    for strength in (0.25, 0.5, 1.0):
        part = t.at(strength)
        assert bures_wasserstein(harmful, part(harmful)).total == pytest.approx(strength**2 * t.cost, rel=1e-10)
        assert part.cost == pytest.approx(strength**2 * t.cost)
        assert relative(part(harmful), (1 - strength) * harmful + strength * t(harmful)) < 1e-13


@pytest.mark.parametrize("complement", ["keep", "drop"])
def test_strength_is_the_identity_to_the_bit_at_zero_and_composes(complement):
    harmful, harmless = classes()
    t = GaussianMap.fit(harmful, harmless, complement=complement)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert torch.equal(t.at(0.0)(harmful.to(dtype)), harmful.to(dtype))
    assert relative(t.at(0.5).at(0.5)(harmful), t.at(0.25)(harmful)) < 1e-13


def test_map_is_monotone():
    harmful, harmless = classes()
    t = GaussianMap.fit(harmful, harmless, k=4)
    x, y = normal(200, 12, seed=4) * 5, normal(200, 12, seed=5) * 5
    assert ((x - y) * (t(x) - t(y))).sum(1).min() > 0


def test_factors_are_the_map():
    harmful, harmless = classes()
    t = GaussianMap.fit(harmful, harmless, k=3)
    u, v, c = t.factors()
    assert u.shape == v.shape == (12, 3)
    assert relative(harmful + harmful @ v @ u.mT + c, t(harmful)) < 1e-13


def test_dropped_complement_becomes_the_harmless_mean_and_has_no_factors():
    harmful, harmless = classes()
    t = GaussianMap.fit(harmful, harmless, k=2, complement="drop")
    outside = torch.eye(12, dtype=torch.float64) - t.basis @ t.basis.mT
    assert relative(t(harmful) @ outside, (harmless.mean(0) @ outside).expand(60, 12)) < 1e-12
    inside = GaussianMap.fit(harmful, harmless, k=2)(harmful) @ t.basis
    assert relative(t(harmful) @ t.basis, inside) < 1e-12
    with pytest.raises(ReplibError, match="fit with 'keep'"):
        t.factors()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_comes_back_in_its_own_dtype_and_close(dtype):
    harmful, harmless = classes()
    harmful, harmless = harmful.to(dtype), harmless.to(dtype)
    t = GaussianMap.fit(harmful, harmless)
    moved = t(harmful)
    assert moved.dtype == dtype
    assert relative(moved.double(), t(harmful.double())) < 2 * torch.finfo(dtype).eps


def test_numpy_and_torch_give_one_map():
    harmful, harmless = (rows.float() for rows in classes())
    assert torch.equal(
        GaussianMap.fit(harmful.numpy(), harmless.numpy())(harmful),
        GaussianMap.fit(harmful, harmless)(harmful),
    )


def test_fit_does_not_depend_on_order_and_the_call_not_on_batching():
    harmful, harmless = classes()
    t = GaussianMap.fit(harmful, harmless)
    shuffled = GaussianMap.fit(harmful.flip(0), harmless[torch.randperm(45)])
    assert relative(shuffled(harmful), t(harmful)) < 1e-12
    assert relative(shuffled.basis, t.basis) < 1e-12
    batch = harmful.reshape(3, 20, 12)
    assert relative(t(batch).reshape(60, 12), torch.stack([t(row) for row in harmful])) < 1e-13


def test_map_turns_with_the_space():
    harmful, harmless = classes()
    rotation = torch.linalg.qr(normal(12, 12, seed=9))[0]
    t, turned = GaussianMap.fit(harmful, harmless), GaussianMap.fit(harmful @ rotation, harmless @ rotation)
    assert relative(turned(harmful @ rotation), t(harmful) @ rotation) < 1e-10


def test_there_and_back_is_the_identity():
    harmful, harmless = classes()
    there, back = GaussianMap.fit(harmful, harmless, k=3), GaussianMap.fit(harmless, harmful, k=3)
    assert relative(back(there(harmful)), harmful) < 1e-12


def test_duplicate_prompts_and_constant_coordinates_are_ordinary():
    harmful, harmless = classes()
    harmful, harmless = torch.cat([harmful, harmful[:20]]), harmless.clone()
    harmful[:, 5] = harmless[:, 5] = 7.0
    moved = GaussianMap.fit(harmful, harmless)(harmful)
    assert torch.isfinite(moved).all()
    assert torch.allclose(moved[:, 5], harmful[:, 5])


def test_source_flat_along_an_axis_needs_the_ridge():
    harmful, harmless = classes()
    harmful = harmful.mean(0).expand(60, 12) + normal(60, 1) * normal(1, 12, seed=6)
    with pytest.raises(ReplibError, match="ridge > 0"):
        GaussianMap.fit(harmful, harmless, k=3, ridge=0.0)
    assert torch.isfinite(GaussianMap.fit(harmful, harmless, k=3)(harmful)).all()


# ------------------------------------------------------------------------------------ the basis
@pytest.mark.parametrize(("n", "d"), [(30, 100), (100, 30)])
def test_axes_and_signs_are_those_of_scikit_learn(n, d):
    rows = normal(n, d) * torch.linspace(1, 3, d, dtype=torch.float64)
    axes, energy = principal_axes(rows - rows.mean(0), 3)
    oracle = PCA(3, svd_solver="full").fit(rows.numpy())
    assert np.allclose(axes.mT, oracle.components_, atol=1e-9)
    assert np.allclose(energy[:3] / (n - 1), oracle.explained_variance_)


def test_pooled_basis_sees_the_gap_that_a_within_class_basis_misses():
    noise, gap = normal(80, 30) * 0.5, torch.zeros(30, dtype=torch.float64)
    gap[7] = 4.0
    harmful, harmless = noise[:40] + gap, noise[40:]
    assert GaussianMap.fit(harmful, harmless, k=1).rho > 0.95
    within = torch.cat([harmful - harmful.mean(0), harmless - harmless.mean(0)])
    axes, _ = principal_axes(within, 1)
    means = harmless.mean(0) - harmful.mean(0)
    assert float((means @ axes).square().sum() / means.square().sum()) < 0.1


def test_massive_coordinates_hide_the_gap_with_a_warning_and_mean_first_finds_it():
    harmful, harmless = normal(60, 30), normal(60, 30, seed=1)
    harmful[:, 3] += 4
    for cloud in (harmful, harmless):
        cloud[:, :2] *= 1000
        cloud[:, :2] -= cloud[:, :2].mean(0)
    with pytest.warns(UserWarning, match="mean_first"):
        assert GaussianMap.fit(harmful, harmless, k=2).rho < 0.1
    t = GaussianMap.fit(harmful, harmless, k=2, basis="mean_first")
    assert t.rho == pytest.approx(1)
    assert relative(t.basis.mT @ t.basis, torch.eye(2, dtype=torch.float64)) < 1e-10
    assert torch.allclose(t(harmful).mean(0), harmless.mean(0), atol=1e-9)


def test_direction_is_from_harmful_to_harmless():
    harmful, harmless = classes()
    t, wrong = GaussianMap.fit(harmful, harmless, k=2), GaussianMap.fit(harmless, harmful, k=2)
    distance = [float((m(harmful).mean(0) - harmless.mean(0)).norm()) for m in (t, wrong)]
    assert distance[0] < 0.1 * distance[1]


def test_covariance_is_about_the_class_mean_not_the_pooled_mean():
    harmful, harmless = classes()
    t = GaussianMap.fit(harmful, harmless, k=2, ridge=0.0)
    pooled = torch.cat([harmful, harmless]).mean(0)
    wrong = monge_scale((harmful - pooled) @ t.basis / 59**0.5, (harmless - pooled) @ t.basis / 44**0.5)
    assert relative(wrong, t.scale) > 0.1


# ------------------------------------------------------------------------------------ distances
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


@pytest.mark.parametrize(("n", "d"), [(20, 60), (200, 15)])
def test_shrinkage_agrees_with_scikit_learn(n, d):
    rows = normal(n, d) * torch.linspace(0.2, 2, d, dtype=torch.float64) + 1
    assert shrinkage(rows) == pytest.approx(LedoitWolf().fit(rows.numpy()).shrinkage_, rel=1e-10)
    assert shrinkage(rows, rule="oas") == pytest.approx(OAS().fit(rows.numpy()).shrinkage_, rel=1e-10)


# ------------------------------------------------------------------------------------ faults
def with_value(value):
    rows = classes()[0].clone()
    rows[4, 2] = value
    return rows


@pytest.mark.parametrize(
    ("source", "target", "options", "message"),
    [
        (with_value(math.nan), classes()[1], {}, "NaN or inf in 1 of 60 rows, first 4"),
        (classes()[1], with_value(math.inf), {}, "second class has NaN or inf"),
        (normal(60, 12), normal(60, 11), {}, "widths 12 and 11"),
        (normal(0, 12), normal(60, 12), {}, "first class has shape"),
        (normal(60, 12), normal(12), {}, "second class has shape"),
        (normal(2, 12), normal(60, 12), {"k": 2}, "add prompts or lower k"),
        (normal(60, 12), normal(60, 12, seed=1), {"k": 13}, "rank 12; lower k"),
        (normal(60, 12), normal(60, 12), {"k": 0}, "at least one axis"),
        (normal(60, 12), normal(60, 12), {"ridge": -1.0}, "ridge is -1.0"),
        (normal(60, 12), normal(60, 12), {"basis": "pca"}, "choose from"),
        (normal(60, 12), normal(60, 12), {"complement": "half"}, "choose from"),
        (normal(60, 12), normal(60, 12), {"basis": "mean_first"}, "use 'pooled_pca'"),
        (normal(1, 12).expand(9, 12), normal(1, 12, seed=1).expand(9, 12), {"k": 1}, "neither class varies"),
    ],
)
def test_unusable_input_is_refused_with_the_reason(source, target, options, message):
    with pytest.raises(ReplibError, match=message):
        GaussianMap.fit(source, target, **options)


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan])
def test_strength_outside_the_geodesic_is_refused(strength):
    with pytest.raises(ReplibError, match="runs from 0"):
        GaussianMap.fit(*classes()).at(strength)


def test_distances_refuse_too_few_samples_and_unknown_rules():
    with pytest.raises(ReplibError, match="at least two prompts"):
        bures_wasserstein(normal(1, 3), normal(5, 3))
    with pytest.raises(ReplibError, match="needs 4 a class"):
        bures_wasserstein_debiased(normal(3, 3), normal(5, 3))
    with pytest.raises(ReplibError, match="'ledoit_wolf' or 'oas'"):
        shrinkage(normal(9, 3), rule="none")
