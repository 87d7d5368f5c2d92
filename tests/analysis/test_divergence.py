"""Geometry of two classes: oracles, bounds, nulls that hold and differences that show."""

import math
import time

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.spatial.distance import cdist, jensenshannon
from scipy.stats import norm
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score

from replib.analysis.divergence import js_discrete, js_divergence, p_value
from replib.analysis.geometry import pairwise_distance, pca
from replib.analysis.probe import _platt, _ridge_scores, cross_fitted_logits
from replib.analysis.profile import layer_profile
from replib.core.errors import ReplibError
from replib.transport.bures_wasserstein import bures_wasserstein_null

LN2 = math.log(2)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def true_js(gap):
    """JS of N(0, 1) and N(gap, 1), by quadrature."""

    def integrand(x):
        p, q = norm.pdf(x), norm.pdf(x - gap)
        m = (p + q) / 2
        return (p * np.log(p / m) + q * np.log(q / m)) / 2

    return quad(integrand, -8, gap + 8, limit=200)[0]


# ------------------------------------------------------------------------------------ PCA
@pytest.mark.parametrize(("n", "d"), [(40, 90), (90, 40)])
def test_pca_agrees_with_scikit_learn_signs_included(n, d):
    x = normal(n, d) * torch.linspace(1, 3, d, dtype=torch.float64) + 5
    ours, oracle = pca(x, 3), PCA(3, svd_solver="full").fit(x.numpy())
    assert np.allclose(ours.scores, oracle.transform(x.numpy()), atol=1e-8)
    assert np.allclose(ours.ratio, oracle.explained_variance_ratio_)
    assert np.allclose(ours(x.numpy()), ours.scores)


def test_joint_pca_is_the_pca_of_all_rows_and_keeps_the_layers_apart():
    layers = normal(3, 20, 8)
    joint = pca(layers)
    assert joint.scores.shape == (3, 20, 2)
    assert torch.allclose(joint.scores.reshape(60, 2), pca(layers.reshape(60, 8)).scores)
    assert torch.allclose(joint(layers[1]), joint.scores[1])


def test_pca_of_float32_is_that_of_float64():
    x = normal(50, 30).float()
    assert torch.equal(pca(x).scores, pca(x.double()).scores)


# ------------------------------------------------------------------------------------ distances
@pytest.mark.parametrize("d", [4, 100])
def test_distances_agree_with_scipy(d):
    x, y = normal(20, d) + 3, normal(15, d, seed=1)
    ours = pairwise_distance(x, y)
    assert ours.between == pytest.approx(cdist(x, y).mean(), rel=1e-10)
    assert ours.paired == pytest.approx(np.diag(cdist(x[:15], y)).mean(), rel=1e-10)
    assert ours.centroids == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)), rel=1e-10)
    assert ours.within_harmful == pytest.approx(cdist(x, x)[np.triu_indices(20, 1)].mean(), rel=1e-10)
    assert ours.within_harmless == pytest.approx(cdist(y, y)[np.triu_indices(15, 1)].mean(), rel=1e-10)


def test_distances_scale_with_the_activations_and_do_not_see_rotation():
    x, y = normal(20, 10) + 1, normal(20, 10, seed=1)
    rotation = torch.linalg.qr(normal(10, 10, seed=2))[0]
    assert pairwise_distance(3 * x @ rotation, 3 * y @ rotation) == pytest.approx(
        tuple(3 * value for value in pairwise_distance(x, y))
    )


def test_spread_without_a_gap_moves_the_paper_s_distance_but_not_the_centroids():
    x, y = normal(200, 50), normal(200, 50, seed=1)
    tight, wide = pairwise_distance(x, y), pairwise_distance(10 * x, 10 * y)
    assert wide.between > 9 * tight.between
    assert wide.between == pytest.approx(wide.within_harmful, rel=0.02)


# ------------------------------------------------------------------------------------ discrete JS
def test_discrete_js_agrees_with_scipy():
    p, q = normal(7, 30) * 3, normal(7, 30, seed=1) * 3
    oracle = jensenshannon(p.softmax(-1), q.softmax(-1), axis=-1) ** 2
    assert np.allclose(js_discrete(p, q), oracle, rtol=1e-10)
    assert torch.allclose(js_discrete(p, q), js_discrete(q, p))
    assert np.allclose(js_discrete(p.float(), q.float()), oracle, rtol=1e-4)


def test_discrete_js_with_impossible_outcomes_is_ln_2_when_disjoint():
    p, q = torch.tensor([0.0, 0.0, -math.inf]), torch.tensor([-math.inf, -math.inf, 3.0])
    assert float(js_discrete(p, q)) == pytest.approx(LN2)
    half = torch.tensor([-math.inf, 1.0, 1.0])
    oracle = jensenshannon(p.softmax(-1), half.softmax(-1)) ** 2
    assert float(js_discrete(p, half)) == pytest.approx(oracle, rel=1e-5)


def test_discrete_js_does_not_see_the_scale_of_probabilities_and_is_neither_jeffreys_nor_one_kl():
    p, q = normal(30), normal(30, seed=1)
    value = float(js_discrete(p, q + 100))
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    jeffreys = float(((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()) / 2
    assert value == pytest.approx(float(js_discrete(p, q)))
    assert value < 0.5 * jeffreys


# ------------------------------------------------------------------------------------ estimated JS
@pytest.mark.parametrize("gap", [0.5, 1.5, 3.0])
def test_classifier_finds_the_true_divergence_of_two_gaussians(gap):
    a, b = normal(1500, 5), normal(1500, 5, seed=1)
    a[:, 2] += gap
    js = js_divergence(a, b, permutations=20)
    assert js.value == pytest.approx(true_js(gap), abs=0.02)
    assert js.interval[0] < true_js(gap) < js.interval[1] + 0.005
    assert js.p_value == pytest.approx(1 / 21)


@pytest.mark.parametrize("estimator", ["classifier", "hist_dim"])
def test_divergence_is_inside_its_null_without_a_difference_and_above_it_with_one(estimator):
    a, b = normal(150, 20), normal(120, 20, seed=1)
    same = js_divergence(a, b, estimator=estimator, permutations=60)
    apart = js_divergence(a + 1, b, estimator=estimator, permutations=60)
    assert same.p_value > 0.05
    assert same.null[0] <= same.value <= same.null[1]
    assert apart.p_value == pytest.approx(1 / 61)
    assert LN2 >= apart.value > apart.null[1]
    assert (apart.n, apart.seed, apart.permutations) == ((150, 120), 0, 60)
    assert apart.distance == pytest.approx(math.sqrt(apart.value))


def test_disjoint_classes_reach_ln_2_and_never_exceed_it():
    js = js_divergence(normal(100, 30) + 50, normal(100, 30, seed=1), permutations=10)
    assert LN2 - 0.02 < js.value <= LN2


def test_divergence_does_not_see_rotation_shift_or_scale():
    a, b = normal(80, 15) + 0.4, normal(80, 15, seed=1)
    rotation = torch.linalg.qr(normal(15, 15, seed=2))[0]
    once = js_divergence(a, b, permutations=5).value
    moved = js_divergence(20 * a @ rotation + 7, 20 * b @ rotation + 7, permutations=5)
    assert moved.value == pytest.approx(once, abs=1e-6)


def test_histogram_estimator_is_the_mean_over_coordinates_of_scipy_s():
    a, b = normal(60, 4) + 1, normal(50, 4, seed=1)
    squares = []
    for i in range(4):
        both = np.concatenate([a[:, i], b[:, i]])
        counts = [np.histogram(x[:, i], bins=50, range=(both.min(), both.max()))[0] for x in (a, b)]
        squares.append(jensenshannon(*counts) ** 2)
    assert js_divergence(a, b, estimator="hist_dim", permutations=2).value == pytest.approx(np.mean(squares))


def test_divergence_repeats_with_its_seed():
    a, b = normal(40, 6) + 0.5, normal(40, 6, seed=1)
    assert js_divergence(a, b, permutations=9, seed=3) == js_divergence(a, b, permutations=9, seed=3)
    assert js_divergence(a, b, permutations=9, seed=3).null != js_divergence(a, b, permutations=9, seed=4).null


def test_permutationp_values_are_uniform_when_nothing_differs():
    p = [
        js_divergence(normal(30, 8, seed=i), normal(30, 8, seed=100 + i), permutations=19, seed=i).p_value
        for i in range(60)
    ]
    assert np.mean(np.array(p) <= 0.2) == pytest.approx(0.2, abs=0.15)


# ------------------------------------------------------------------------------------ the probe
def test_ridge_scores_are_those_of_leaving_one_out_by_hand():
    rows, held = normal(30, 40), normal(6, 40, seed=1)
    labels = torch.arange(30)[:, None] % 3 == 0
    inner, outer = _ridge_scores(rows, labels, held)
    norm_squared = float((rows - rows.mean(0)).square().sum()) / 30
    errors = {}
    for power in range(-5, 3):
        target = labels[:, 0].double().numpy() * 2 - 1
        fits = [
            Ridge(10.0**power * norm_squared).fit(np.delete(rows.numpy(), i, 0), np.delete(target, i))
            for i in range(30)
        ]
        left_out = np.array([fit.predict(rows[i : i + 1].numpy())[0] for i, fit in enumerate(fits)])
        whole = Ridge(10.0**power * norm_squared).fit(rows.numpy(), target).predict(held.numpy())
        errors[((left_out - target) ** 2).sum()] = left_out, whole
    best = errors[min(errors)]
    assert np.allclose(inner[:, 0], best[0], atol=1e-7)
    assert np.allclose(outer[:, 0], best[1], atol=1e-7)


def test_calibration_is_balanced_logistic_regression_on_platt_s_targets():
    labels = torch.arange(300)[:, None] % 4 == 0
    scores = normal(300, 1) + labels
    slope, offset = _platt(scores, labels)
    n = {True: 75, False: 225}
    soft = {True: 76 / 77, False: 1 / 227}
    own = [bool(label) for label in labels[:, 0]]
    weights = [soft[y] / n[y] for y in own] + [(1 - soft[y]) / n[y] for y in own]
    oracle = LogisticRegression(C=1e12, tol=1e-12, max_iter=1000).fit(
        np.tile(scores.numpy(), (2, 1)), [1] * 300 + [0] * 300, np.array(weights)
    )
    assert float(slope) == pytest.approx(oracle.coef_[0, 0], rel=1e-4)
    assert float(offset) == pytest.approx(oracle.intercept_[0], rel=1e-4)


def test_probe_treats_each_labelling_on_its_own():
    rows, labels = normal(60, 10), normal(60, 4, seed=1) > 0
    together = cross_fitted_logits(rows, labels, torch.Generator().manual_seed(0))
    alone = cross_fitted_logits(rows, labels[:, 2:3], torch.Generator().manual_seed(0))
    assert torch.allclose(together[:, 2:3], alone)


def test_probe_is_finite_where_all_rows_are_one_and_where_a_few_are_huge():
    labels = torch.arange(40)[:, None] < 20
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(cross_fitted_logits(torch.ones(40, 5).double(), labels, generator), torch.zeros(40, 1).double())
    rows = normal(40, 5)
    rows[3] *= 1e6
    assert cross_fitted_logits(rows, labels, generator).isfinite().all()


def test_probes_that_are_switched_off_tie_whatever_their_rounding():
    zeros = torch.tensor([0.0, 1e-16, -1e-16, 0.0, -0.1, 0.1]).double()
    assert [p_value(zeros[order]) for order in ([0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5])] == [5 / 6, 5 / 6]


# ------------------------------------------------------------------------------------ profile
def planted(layers=6, n=60, d=40, start=3):
    """No difference before block ``start``, then a gap in one direction."""
    harmful, harmless = normal(layers, n, d).float(), normal(layers, n - 10, d, seed=1).float()
    harmful[start:, :, 0] += 3
    return harmful, harmless


def test_profile_shows_the_planted_depth_in_every_column_that_measures_separation():
    profile = layer_profile(*planted())
    assert profile["layer"].tolist() == list(range(6))
    before, after = slice(0, 3), slice(3, 6)
    assert np.median(profile["js_p"][before]) > 0.1
    assert profile["js"][before] == pytest.approx(0, abs=0.05)
    assert (profile["js_p"][after] < 0.02).all()
    assert (profile["js"][after] > profile["js_null"][after]).all()
    rounding = 1e-12  # a probe that is switched off gives zero in all three, each with a rounding of its own
    assert (profile["js_low"] <= profile["js"] + rounding).all()
    assert (profile["js"] <= profile["js_high"] + rounding).all()
    assert (profile["auroc"][after] > 0.9).all()
    assert (profile["accuracy"][after] > 0.85).all()
    assert profile["auroc"][before] == pytest.approx(0.5, abs=0.15)
    assert profile["bw_mean"][before] == pytest.approx(0, abs=1)
    assert profile["bw_mean"][after] == pytest.approx(9, rel=0.25)
    assert np.abs(profile["bw_covariance"] / profile["spread"]).max() < 0.05
    assert (profile["bw_mean_p"][after] < 0.02).all() and np.median(profile["bw_mean_p"][before]) > 0.1
    assert np.median(profile["bw_covariance_p"]) > 0.1
    assert (profile["bw_mean"][after] > profile["bw_mean_high"][after]).all()
    assert (profile["bw_covariance_low"] < 0).all() and (profile["bw_covariance_high"] > 0).all()
    assert (profile.n, profile.seed) == ((60, 50), 0)


def test_profile_of_numpy_is_that_of_torch():
    harmful, harmless = planted(layers=1)
    ours = layer_profile(harmful.numpy(), harmless.numpy(), permutations=5).columns
    assert ours == layer_profile(harmful, harmless, permutations=5).columns


def test_profile_rows_are_what_the_single_functions_say():
    harmful, harmless = planted()
    profile = layer_profile(harmful, harmless, permutations=30, seed=5)
    js = js_divergence(harmful[4], harmless[4], permutations=30, seed=5)
    assert (profile["js"][4], profile["js_p"][4]) == pytest.approx((js.value, js.p_value))
    assert (profile["js_low"][4], profile["js_high"][4]) == pytest.approx(js.interval)
    null = bures_wasserstein_null(harmful[4], harmless[4], permutations=30, seed=5)
    assert profile["bw_mean_p"][4] == null.p_value.mean
    assert profile["bw_covariance_high"][4] == pytest.approx(null.high.covariance - null.centre.covariance)
    assert profile["between"][4] == pytest.approx(pairwise_distance(harmful[4], harmless[4]).between)


def test_auroc_agrees_with_scikit_learn():
    harmful, harmless = planted()
    rows = torch.cat([harmful[4], harmless[4]]).double()
    labels = torch.arange(110)[:, None] < 60
    profile = layer_profile(harmful[4:5], harmless[4:5], permutations=1)
    generator = torch.Generator().manual_seed(0)
    torch.randperm(110, generator=generator)  # the one permutation comes first
    logits = cross_fitted_logits(rows - rows.mean(0), labels, generator)
    assert profile["auroc"][0] == pytest.approx(roc_auc_score(labels[:, 0], logits[:, 0]))


def test_profile_of_a_dozen_layers_takes_seconds():
    harmful, harmless = planted(layers=12, n=205, d=160, start=5)
    start = time.process_time()
    layer_profile(harmful, harmless)
    assert time.process_time() - start < 12  # about 4 s on one free core


# ------------------------------------------------------------------------------------ faults
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pca(normal(9, 4), 0), "at least one component"),
        (lambda: pca(normal(3, 9), 3), "rank 2; lower k"),
        (lambda: pca(torch.full((5, 4), math.nan)), "NaN or inf in 5 of 5"),
        (lambda: pca(normal(5)), "must be \\[prompts, dim\\]"),
        (lambda: pairwise_distance(normal(1, 4), normal(5, 4)), "at least two prompts"),
        (lambda: pairwise_distance(normal(5, 4), normal(5, 3)), "widths 4 and 3"),
        (lambda: js_divergence(normal(9, 4), normal(50, 4)), "10 prompts a class"),
        (lambda: js_divergence(normal(50, 4), normal(50, 4), permutations=0), "at least one permutation"),
        (lambda: js_divergence(normal(50, 4), normal(50, 4), estimator="kde"), "choose 'classifier'"),
        (lambda: layer_profile(normal(50, 4), normal(50, 4)), "layers, prompts, dim"),
        (lambda: layer_profile(normal(3, 50, 4), normal(2, 50, 4)), "same layers"),
    ],
)
def test_unusable_input_is_refused_with_the_reason(call, message):
    with pytest.raises(ReplibError, match=message):
        call()
