"""Gaussian transport: theorems of the map, oracles for each number, and the known ways to get it wrong."""

import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.covariance import OAS, LedoitWolf

from helpers.gaussians import (
    classes,
    conditioned,
    covariance,
    exact_scale,
    massive,
    normal,
    relative,
    rotation,
    textbook_scale,
)
from replib.core.errors import ReplibError
from replib.transport.bases import BASES
from replib.transport.bures_wasserstein import bures_wasserstein
from replib.transport.gaussian_map import GaussianMap, monge_scale
from replib.transport.gaussians import Moments

EYE = torch.eye(6, dtype=torch.float64)


# ------------------------------------------------------------------------------------ the scale A
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e8, 1e10, 1e12])
def test_scale_pushes_the_source_covariance_onto_the_target(condition):
    source, target = conditioned(8, condition), conditioned(8, condition, seed=5)
    a = monge_scale(source, target)
    assert relative(covariance(source @ a), covariance(target)) < 3e-14
    assert torch.equal(a, a.mT)
    assert torch.linalg.eigvalsh(a).min() > 0


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e8, 1e10, 1e12])
def test_over_many_problems_the_error_grows_with_the_condition_of_the_factors_at_most(condition):
    """That is the root of the covariances'. Of most problems it does not grow at all, but of a few in a hundred."""
    pairs = [
        (conditioned(k, condition, seed), conditioned(k, condition, seed + 3)) for k in (3, 4, 8) for seed in range(40)
    ]
    errors = torch.tensor([relative(covariance(s @ monge_scale(s, t)), covariance(t)) for s, t in pairs])
    assert errors.max() < 100 * torch.finfo(torch.float64).eps * condition**0.5 and errors.median() < 3e-14


@pytest.mark.parametrize(
    ("condition", "tolerance"), [(1e2, 1e-14), (1e4, 3e-14), (1e6, 1e-13), (1e8, 1e-12), (1e10, 1e-11), (1e12, 1e-10)]
)
def test_scale_agrees_with_sixty_digits(condition, tolerance):
    source, target = conditioned(6, condition), conditioned(6, condition, seed=5)
    assert relative(monge_scale(source, target), exact_scale(source, target)) < tolerance


def test_public_formulas_on_covariances_have_lost_every_digit_by_then():
    """POT gives no number at all; the symmetric-root formula, as in concept-erasure, a wrong one."""
    source, target = conditioned(24, 1e12), conditioned(24, 1e12, seed=5)
    s, t = covariance(source), covariance(target)
    with np.errstate(all="ignore"):
        theirs, _ = ot.gaussian.bures_wasserstein_mapping(np.zeros(24), np.zeros(24), s.numpy(), t.numpy())
    assert np.isnan(theirs).all()
    pushed = [relative(covariance(source @ a), t) for a in (monge_scale(source, target), textbook_scale(s, t))]
    assert pushed[0] < 3e-14 < 1e-8 < pushed[1]


def test_scale_agrees_with_the_symmetric_root_formula_where_that_is_valid():
    source, target = conditioned(8, 1e3), conditioned(8, 1e3, seed=5)
    assert relative(monge_scale(source, target), textbook_scale(covariance(source), covariance(target))) < 1e-10


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e5, 1e8])
def test_scale_in_float32_keeps_float32_accuracy(condition):
    source, target = conditioned(24, condition).float(), conditioned(24, condition, seed=5).float()
    a = monge_scale(source, target)
    assert a.dtype == torch.float32
    assert relative(covariance(source.double() @ a.double()), covariance(target.double())) < 2e-6


def test_scale_of_a_distribution_onto_itself_is_the_identity_and_onto_a_multiple_is_the_multiple():
    source = conditioned(6, 1e4)
    rotated = rotation(18) @ source  # another factor of the same covariance
    assert relative(monge_scale(source, rotated), EYE) < 1e-12
    assert relative(monge_scale(source, 3 * rotated), 3 * EYE) < 1e-12


def test_scale_there_and_back_is_the_identity():
    source, target = conditioned(6, 1e4), conditioned(6, 1e4, seed=5)
    assert relative(monge_scale(target, source) @ monge_scale(source, target), EYE) < 1e-11


def test_scale_of_commuting_covariances_is_the_ratio_of_deviations():
    axes = rotation(5)
    a, b = torch.logspace(0, -2, 5, dtype=torch.float64), torch.logspace(-1, 1, 5, dtype=torch.float64)
    exact = axes @ torch.diag(b / a) @ axes.mT
    assert relative(monge_scale(a[:, None] * axes.mT, b[:, None] * axes.mT), exact) < 1e-13


def test_scale_turns_with_the_space_and_its_determinant_is_the_ratio_of_volumes():
    source, target, turn = conditioned(6, 1e4), conditioned(6, 1e4, seed=5), rotation(6)
    a = monge_scale(source, target)
    assert relative(monge_scale(source @ turn.mT, target @ turn.mT), turn @ a @ turn.mT) < 1e-12
    volumes = torch.logdet(covariance(target)) - torch.logdet(covariance(source))
    assert float(torch.logdet(a)) == pytest.approx(float(volumes) / 2, abs=1e-10)


# ------------------------------------------------------------------------------------ the map T
def test_transported_samples_take_on_mean_and_covariance_of_the_target_and_keep_the_complement():
    harmful, harmless = classes()
    t = GaussianMap(3, ridge=0.0).fit(harmful, harmless)
    moved = t.transform(harmful)
    inside, wanted = moved @ t.basis_, harmless @ t.basis_
    assert torch.allclose(inside.mean(0), wanted.mean(0), atol=1e-13)
    assert relative(inside.mT.cov(), wanted.mT.cov()) < 1e-13
    outside = torch.eye(12, dtype=torch.float64) - t.basis_ @ t.basis_.mT
    assert ((moved - harmful) @ outside).abs().max() < 1e-14
    assert t.n_samples_ == (60, 45)


def dense(harmful, harmless, ridge=(0.0, 0.0), weights=(0.0, 0.0)):
    """POT's map of the whole space as (A, b), row vectors, from covariances shrunk as told."""
    identity = torch.eye(harmful.shape[1], dtype=torch.float64)
    covariances = [
        (1 - w) * x.mT.cov() + r * identity for x, r, w in zip((harmful, harmless), ridge, weights, strict=True)
    ]
    return ot.gaussian.bures_wasserstein_mapping(harmful.mean(0), harmless.mean(0), *covariances)


def test_agrees_with_pot_in_the_whole_space():
    harmful, harmless = classes()
    t = GaussianMap(12, ridge=0.0).fit(harmful, harmless)
    a, b = dense(harmful, harmless)
    assert relative(t.transform(harmful), harmful @ a + b) < 1e-11


@pytest.mark.parametrize("size", [{"n": 14, "m": 11, "d": 40}, {"n": 90, "m": 110, "d": 300}])
def test_whole_span_with_ridge_is_the_dense_ridge_map(size):
    harmful, harmless = classes(**size)
    t = GaussianMap(None, ridge=0.5).fit(harmful, harmless)
    assert t.basis_.shape[1] == size["n"] + size["m"] - 1 and t.kept_ == 1
    floor = 0.5 * (harmful.var(0).mean() + harmless.var(0).mean()) / 2
    a, b = dense(harmful, harmless, (floor, floor))
    x = normal(5, size["d"], seed=8)
    assert relative(t.transform(x), x @ a + b) < 1e-10


@pytest.mark.parametrize(("rule", "oracle"), [("ledoit_wolf", LedoitWolf), ("oas", OAS)])
def test_whole_span_with_shrinkage_is_the_dense_map_between_scikit_learns_covariances(rule, oracle):
    harmful, harmless = classes(n=14, m=11, d=40)
    t = GaussianMap(None, ridge=rule).fit(harmful, harmless)
    weights = [oracle().fit(x.numpy()).shrinkage_ for x in (harmful, harmless)]
    floors = [w * x.var(0).mean() for w, x in zip(weights, (harmful, harmless), strict=True)]
    a, b = dense(harmful, harmless, floors, weights)
    x = normal(5, 40, seed=8)
    assert relative(t.transform(x), x @ a + b) < 1e-10
    assert t.kept_ == pytest.approx(math.sqrt(floors[1] / floors[0]), rel=1e-10) and t.kept_ != 1
    moved = t.transform(harmful) - harmful
    assert t.cost_ == pytest.approx(float(moved.mean(0).square().sum() + moved.var(0).sum()), rel=1e-12)


def test_shrinkage_inside_a_basis_is_that_of_the_projected_samples():
    harmful, harmless = classes()
    t = GaussianMap(5, ridge="oas").fit(harmful, harmless)
    shrunk = [
        OAS().fit((x @ t.basis_).numpy()).covariance_ * len(x) / (len(x) - 1) for x in (harmful, harmless)
    ]  # scikit-learn divides by n
    source, target = map(torch.from_numpy, shrunk)
    assert relative(t.scale_ @ source @ t.scale_, target) < 1e-12


def test_one_axis_scales_by_the_ratio_of_deviations():
    harmful, harmless = classes()
    t = GaussianMap(1, ridge=0.0).fit(harmful, harmless)
    ratio = (harmless @ t.basis_).std() / (harmful @ t.basis_).std()
    assert float(t.scale_) == pytest.approx(float(ratio), rel=1e-13)


def test_cost_is_the_squared_distance_and_the_geodesic_is_uniform():
    harmful, harmless = classes()
    t = GaussianMap(3, ridge=0.0).fit(harmful, harmless)
    inside = bures_wasserstein(harmful @ t.basis_, harmless @ t.basis_)
    assert t.cost_ == pytest.approx(inside.total, rel=1e-12)
    for strength in (0.25, 0.5, 1.0):
        part = t.at(strength)
        moved = part.transform(harmful)
        assert bures_wasserstein(harmful, moved).total == pytest.approx(strength**2 * t.cost_, rel=1e-11)
        assert part.cost_ == pytest.approx(strength**2 * t.cost_)
        assert relative(moved, (1 - strength) * harmful + strength * t.transform(harmful)) < 1e-14


@pytest.mark.parametrize("options", [{}, {"k": None, "ridge": "oas"}])
def test_strength_is_the_identity_to_the_bit_at_zero_and_composes(options):
    harmful, harmless = classes()
    t = GaussianMap(**options).fit(harmful, harmless)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert torch.equal(t.at(0.0).transform(harmful.to(dtype)), harmful.to(dtype))
    assert relative(t.at(0.5).at(0.5).transform(harmful), t.at(0.25).transform(harmful)) < 1e-14


def test_beyond_the_geodesic_only_if_asked_for():
    harmful, harmless = classes()
    t = GaussianMap().fit(harmful, harmless)
    for strength in (-0.1, 1.1, math.nan):
        with pytest.raises(ReplibError, match=r"outside \[0, 1\].*extrapolate=True"):
            t.at(strength)
    with pytest.raises(ReplibError, match=r"outside \[0, 1\].*extrapolate=True"):
        t.at(math.inf, extrapolate=True)
    twice = t.at(2.0, extrapolate=True).transform(harmful)
    assert relative(twice - harmful, 2 * (t.transform(harmful) - harmful)) < 1e-13


def test_map_is_monotone():
    harmful, harmless = classes()
    t = GaussianMap(4).fit(harmful, harmless)
    x, y = normal(200, 12, seed=4) * 5, normal(200, 12, seed=5) * 5
    assert ((x - y) * (t.transform(x) - t.transform(y))).sum(1).min() > 0


@pytest.mark.parametrize("options", [{}, {"k": None, "ridge": "oas"}])
def test_edit_is_the_map(options):
    harmful, harmless = classes()
    t = GaussianMap(**{"k": 3} | options).fit(harmful, harmless)
    edit = t.edit()
    scaled = 0 if edit.s is None else edit.s * harmful
    assert relative(harmful + harmful @ edit.v @ edit.u.mT + edit.c + scaled, t.transform(harmful)) < 1e-13
    assert relative(t.edit()(harmful.float()).double(), t.transform(harmful)) < 1e-6


def test_maps_compose_as_edits():
    harmful, harmless = classes()
    first, second = GaussianMap(3).fit(harmful, harmless), GaussianMap(2).fit(*classes(seed=7))
    both = second.edit() @ first.edit()
    assert both.u.shape == (12, 5)
    assert relative(both(harmful.float()).double(), second.transform(first.transform(harmful))) < 2e-6


def test_a_map_that_folds_the_space_has_no_inverse():
    harmful, harmless = classes()
    with pytest.raises(ReplibError, match="folds"):
        GaussianMap().fit(harmful, harmless).at(9.0, extrapolate=True).inverse()


@pytest.mark.parametrize("options", [{"k": 3}, {"k": None, "ridge": "oas"}])
def test_inverse_undoes_the_map_and_is_the_map_back(options):
    harmful, harmless = classes()
    there = GaussianMap(**options).fit(harmful, harmless)
    back = GaussianMap(**options).fit(harmless, harmful)
    moved = there.transform(harmful)
    assert relative(there.inverse_transform(moved), harmful) < 1e-13
    assert relative(back.transform(moved), harmful) < 1e-12
    inverse = there.inverse()
    assert relative(inverse.scale_, back.scale_) < 1e-12 and inverse.n_samples_ == (45, 60)
    assert relative(inverse.inverse().scale_, there.scale_) < 1e-13


# ------------------------------------------------------------------------------------ an estimator
def test_is_a_scikit_learn_estimator():
    harmful, harmless = classes()
    t = GaussianMap(3, basis="mean_first", ridge="oas")
    assert t.get_params() == {"k": 3, "basis": "mean_first", "ridge": "oas"}
    assert t.fit(harmful, harmless) is t
    copy = clone(t)
    assert copy.get_params() == t.get_params() and not hasattr(copy, "basis_")
    assert torch.equal(copy.fit_transform(harmful, harmless), t.transform(harmful))
    assert copy.set_params(k=1).fit(harmful, harmless).basis_.shape == (12, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_comes_back_in_its_own_dtype_and_close(dtype):
    harmful, harmless = (rows.to(dtype) for rows in classes())
    t = GaussianMap().fit(harmful, harmless)
    moved = t.transform(harmful)
    assert moved.dtype == dtype
    assert relative(moved.double(), t.transform(harmful.double())) < 2 * torch.finfo(dtype).eps


def test_numpy_in_gives_numpy_of_the_same_numbers():
    harmful, harmless = (rows.float() for rows in classes())
    ours = GaussianMap().fit(harmful.numpy(), harmless.numpy()).transform(harmful.numpy())
    assert isinstance(ours, np.ndarray) and ours.dtype == np.float32
    assert np.array_equal(ours, GaussianMap().fit(harmful, harmless).transform(harmful))


def test_fit_does_not_depend_on_order_and_transform_not_on_batching():
    harmful, harmless = classes()
    t = GaussianMap().fit(harmful, harmless)
    shuffled = GaussianMap().fit(harmful.flip(0), harmless[torch.randperm(45)])
    assert relative(shuffled.transform(harmful), t.transform(harmful)) < 1e-13
    assert relative(shuffled.basis_, t.basis_) < 1e-13
    batch = t.transform(harmful.reshape(3, 20, 12)).reshape(60, 12)
    assert relative(batch, torch.stack([t.transform(row) for row in harmful])) < 1e-14


@pytest.mark.parametrize("options", [{}, {"k": None, "ridge": "oas"}, {"basis": "mean_first"}])
@pytest.mark.parametrize("sizes", [(1, 7, 52), (30, 30), (60,)])
def test_streamed_moments_give_the_map_of_all_samples(options, sizes):
    harmful, harmless = classes(d=20)
    streams = [Moments(rank=64) for _ in range(2)]
    for moments, rows in zip(streams, (harmful, harmless), strict=True):
        for piece in rows[None].split([min(s, 45) for s in sizes] if sum(sizes) == len(rows) == 45 else 9, dim=1):
            moments.update(piece)
    streamed = GaussianMap(**options).fit(*(moments.gaussian(0) for moments in streams))
    t = GaussianMap(**options).fit(harmful, harmless)
    assert relative(streamed.transform(harmful), t.transform(harmful)) < 1e-11
    assert streamed.cost_ == pytest.approx(t.cost_, rel=1e-10) and streamed.n_samples_ == (60, 45)


def test_what_needs_the_samples_is_refused_of_streamed_ones():
    streams = [Moments(rank=64).update(rows[None]).gaussian(0) for rows in classes()]
    with pytest.raises(ReplibError, match="Ledoit-Wolf.* needs the samples"):
        GaussianMap(ridge="ledoit_wolf").fit(*streams)


def test_map_turns_moves_and_stretches_with_the_space():
    harmful, harmless = classes()
    t = GaussianMap().fit(harmful, harmless)
    for scale in (1e-6, 1.0, 1e6):
        turn, shift = scale * rotation(12), scale * normal(12, seed=3)
        turned = GaussianMap().fit(harmful @ turn + shift, harmless @ turn + shift)
        assert relative(turned.transform(harmful @ turn + shift), t.transform(harmful) @ turn + shift) < 1e-12


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(6, 30),
    m=st.integers(6, 30),
    d=st.integers(5, 60),
    k=st.integers(1, 5),
    basis=st.sampled_from(list(BASES)),
    seed=st.integers(0, 99),
)
def test_any_two_clouds_are_matched_inside_any_basis(n, m, d, k, basis, seed):
    harmful, harmless = normal(n, d, seed=seed) * 3 + 5, normal(m, d, seed=seed + 1)
    t = GaussianMap(k, basis=basis, ridge=0.0).fit(harmful, harmless)
    inside, wanted = t.transform(harmful) @ t.basis_, harmless @ t.basis_
    assert relative(covariance(t.basis_), torch.eye(k, dtype=torch.float64)) < 1e-12
    assert torch.allclose(inside.mean(0), wanted.mean(0), atol=1e-10)
    assert relative(inside.mT.cov().reshape(k, k), wanted.mT.cov().reshape(k, k)) < 1e-8
    assert 0 <= t.rho_ <= 1 + 1e-12 and t.condition_ >= 1 - 1e-12


def test_duplicate_prompts_constant_coordinates_and_unequal_numbers_are_ordinary():
    harmful, harmless = classes()
    harmful, harmless = torch.cat([harmful, harmful[:20]]), harmless.clone()
    harmful[:, 5] = harmless[:, 5] = 7.0
    for basis in BASES:
        moved = GaussianMap(basis=basis).fit(harmful, harmless).transform(harmful)
        assert torch.isfinite(moved).all()
        assert torch.allclose(moved[:, 5], harmful[:, 5])


def test_source_flat_along_an_axis_needs_the_ridge():
    harmful, harmless = classes()
    harmful = harmful.mean(0).expand(60, 12) + normal(60, 1) * normal(1, 12, seed=6)
    with pytest.raises(ReplibError, match="ridge > 0"):
        GaussianMap(3, ridge=0.0).fit(harmful, harmless)
    assert torch.isfinite(GaussianMap(3).fit(harmful, harmless).transform(harmful)).all()


# ------------------------------------------------------------------------------------ on disk
@pytest.mark.parametrize("options", [{}, {"k": None, "ridge": "oas"}, {"basis": "mean_first"}])
def test_a_saved_map_comes_back_to_the_bit(tmp_path, options):
    harmful, harmless = classes()
    t = GaussianMap(**options).fit(harmful, harmless)
    again = GaussianMap.load(t.save(tmp_path / "maps" / "block-7.safetensors"))
    assert torch.equal(again.transform(harmful), t.transform(harmful))
    assert again.get_params() == t.get_params()
    for fact in ("rho_", "cost_", "condition_", "kept_", "n_samples_"):
        assert getattr(again, fact) == getattr(t, fact)


def test_a_file_that_holds_no_map_is_refused(tmp_path):
    with pytest.raises(ReplibError, match="not fitted yet"):
        GaussianMap().save(tmp_path / "map.safetensors")
    other, text = tmp_path / "other.safetensors", tmp_path / "text.safetensors"
    save_file({"x": torch.ones(3)}, other, metadata={"replib": "{}"})
    text.write_text("no tensors")
    for path in (other, text, tmp_path / "missing.safetensors"):
        with pytest.raises(ReplibError, match="holds no GaussianMap"):
            GaussianMap.load(path)


# ------------------------------------------------------------------------------------ known-wrong public variants
def test_direction_is_from_harmful_to_harmless():
    harmful, harmless = classes()
    t, wrong = GaussianMap().fit(harmful, harmless), GaussianMap().fit(harmless, harmful)
    distance = [float((m.transform(harmful).mean(0) - harmless.mean(0)).norm()) for m in (t, wrong)]
    assert distance[0] < 0.1 * distance[1]


def test_cholesky_in_place_of_the_symmetric_root_is_not_a_transport():
    source, target = conditioned(6, 1e3), conditioned(6, 1e3, seed=5)
    s, t = covariance(source), covariance(target)
    lower = torch.linalg.cholesky(s)
    values, vectors = torch.linalg.eigh(lower @ t @ lower.mT)
    inverse = torch.linalg.inv(lower)
    wrong = inverse @ (vectors * values.clamp_min(0).sqrt() @ vectors.mT) @ inverse
    assert relative(wrong @ s @ wrong, t) > 0.1
    assert relative(wrong, wrong.mT) > 0.1
    assert relative(monge_scale(source, target), wrong) > 0.1


def test_covariance_is_about_the_class_mean_not_the_pooled_mean():
    harmful, harmless = classes()
    t = GaussianMap(ridge=0.0).fit(harmful, harmless)
    pooled = torch.cat([harmful, harmless]).mean(0)
    wrong = monge_scale((harmful - pooled) @ t.basis_ / 59**0.5, (harmless - pooled) @ t.basis_ / 44**0.5)
    assert relative(wrong, t.scale_) > 0.1


def test_one_averaged_direction_is_not_the_affine_map():
    harmful, harmless = classes()
    t = GaussianMap(3, ridge=0.0).fit(harmful, harmless)
    direction = ((t.scale_ - torch.eye(3, dtype=torch.float64)) @ t.basis_.mT).mean(0)
    direction = direction / direction.norm()
    wrong = harmful - (harmful @ direction)[:, None] * direction
    wanted = harmless.mean(0)
    gaps = [float(((x.mean(0) - wanted) @ t.basis_).norm()) for x in (t.transform(harmful), wrong)]
    assert gaps[0] < 1e-10 < 0.1 < gaps[1]


def test_ridge_follows_the_scale_of_the_activations_which_an_absolute_one_does_not():
    factors = conditioned(4, 1e2), conditioned(4, 1e2, seed=5)
    absolute = [
        monge_scale(*(torch.cat([size * f, 1e-3 * torch.eye(4, dtype=torch.float64)]) for f in factors))
        for size in (1.0, 1e-3)
    ]
    assert relative(*absolute) > 0.1
    harmful, harmless = classes()
    small, ordinary = (GaussianMap(4).fit(size * harmful, size * harmless).scale_ for size in (1e-3, 1.0))
    assert relative(small, ordinary) < 1e-10


def test_no_square_matrix_of_the_width_is_kept(tmp_path):
    harmful, harmless = normal(20, 3000), normal(24, 3000, seed=1) + 1
    stored = load_file(GaussianMap(2).fit(harmful, harmless).save(tmp_path / "map.safetensors"))
    assert sum(x.numel() for x in stored.values()) < 3000 * 3 + 20


def test_a_map_between_clouds_of_massive_coordinates_warns_and_names_the_way_out():
    with pytest.warns(UserWarning, match="mean_first"):
        GaussianMap().fit(*massive())


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
        (normal(60, 12), None, {}, "needs two classes"),
        (normal(60, 12), normal(60, 11), {}, "widths 12 and 11"),
        (normal(0, 12), normal(60, 12), {}, "first class has shape"),
        (normal(60, 12), normal(12), {}, "second class has shape"),
        (normal(60, 12), normal(1, 12), {"k": 1}, "at least two prompts"),
        (normal(2, 12), normal(60, 12), {}, "add prompts or lower k"),
        (normal(60, 12), normal(60, 12, seed=1), {"k": 13}, "rank 12; lower k"),
        (normal(3, 12).repeat(4, 1), normal(3, 12, seed=1).repeat(4, 1), {"k": 6}, "rank 5; lower k"),
        (normal(60, 12), normal(60, 12), {"k": 0}, "at least one axis"),
        (normal(60, 12), normal(60, 12), {"ridge": -1.0}, "ridge is -1.0"),
        (normal(60, 12), normal(60, 12), {"ridge": "lw"}, "ridge is 'lw'.*ledoit_wolf"),
        (normal(60, 12), normal(60, 12), {"basis": "pca"}, "use one of pooled, mean_first"),
        (normal(60, 12), normal(60, 12), {"basis": "mean_first"}, "use 'pooled'"),
        (normal(1, 12).expand(9, 12), normal(1, 12, seed=1).expand(9, 12), {"k": 1}, "neither class varies"),
    ],
)
def test_unusable_input_is_refused_with_the_reason(source, target, options, message):
    with pytest.raises(ReplibError, match=message):
        GaussianMap(**options).fit(source, target)


def test_what_cannot_be_transformed_is_refused():
    for verb in (GaussianMap.transform, GaussianMap.inverse_transform):
        with pytest.raises(ReplibError, match="not fitted yet"):
            verb(GaussianMap(), normal(3, 12))
    t = GaussianMap().fit(*classes())
    with pytest.raises(ReplibError, match="of width 12"):
        t.transform(normal(3, 11))
    with pytest.raises(ReplibError, match="floating type"):
        t.transform(np.ones((3, 12), dtype=int))


def test_what_float16_cannot_hold_is_not_returned_as_infinite():
    harmful = classes()[0]
    far = GaussianMap(1).fit(harmful, harmful + 1e5)
    with pytest.raises(ReplibError, match="65504.*bfloat16"):
        far.transform(harmful.half())
    assert far.transform(harmful.bfloat16()).isfinite().all()
