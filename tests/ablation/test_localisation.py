"""Localisation: gaps and features with known truths, onsets and errors in blocks, predictions from other models."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from helpers import tiny
from replib.ablation.localisation import (
    AT_DEPTH,
    RIDGE,
    block_features,
    leave_one_out,
    lens_profile,
    localisation_error,
    localisation_error_table,
    onset,
    scores,
    steepest,
    within_models,
)
from replib.ablation.refusal_score import RefusalTokens, first_logits
from replib.activations.capture import capture
from replib.analysis.profile import layer_profile, relative_gaps
from replib.core.errors import ReplibError
from replib.models.load import load


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


def test_the_onset_is_where_a_share_of_the_maximum_is_reached():
    curve = np.array([0.0, 0.1, 0.45, 0.6, 0.9, 0.3])
    assert onset(curve) == 2 and onset(curve, share=1.0) == 4 and onset(curve, least=0.95) is None
    assert onset(5 * curve) == onset(curve) and onset(np.zeros(4)) is None


def test_the_steepest_block_adds_most():
    assert steepest(np.array([0.1, 0.2, 0.7, 0.8])) == 2
    assert steepest(np.array([0.5, 0.4, 0.3])) == 0 and steepest(np.zeros(3)) is None
    curve = np.random.default_rng(0).normal(size=9)
    assert steepest(curve) == np.diff(curve, prepend=min(0, curve[0])).argmax()


def test_errors_count_blocks_to_the_nearest_planted_one():
    assert [localisation_error(block, (5, 6)) for block in (2, 5, 6, 9)] == [-3, 0, 0, 3] and np.isnan(
        localisation_error(None, (5, 6))
    )
    table = localisation_error_table({"a": {"one": 4, "two": None}, "b": {"one": 8}}, {"a": (5, 6), "b": (7, 8)})
    assert table.error.tolist()[::2] == [-1, 0] and table["last"].tolist() == [6, 6, 8] and len(table) == 3


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_last_block_of_the_lens_is_the_models_own_decision(kind, tmp_path):
    model = load(tiny.save_model(tmp_path, kind))
    prompts = [f"w{i} w{i + 3}" for i in range(12)], [f"w{i} w5 w{i + 1}" for i in range(12)]
    states = [capture(model, texts).values for texts in prompts]
    likely = torch.cat([first_logits(model, texts) for texts in prompts]).mean(0).topk(20).indices
    tokens = RefusalTokens(tuple(likely.tolist()), (), 1.0, 0.0, 12, 12)
    curve = lens_profile(model, *states, tokens)
    said = [(tokens.scores(first_logits(model, texts)) > 0).double().mean() for texts in prompts]
    assert curve.shape == (3,) and curve[-1] == pytest.approx(float(said[0] - said[1]))
    assert np.allclose(lens_profile(model, states[0], states[0], tokens), 0)


def test_the_onset_of_a_sweep_is_the_first_block_of_half_the_best_and_none_without_success():
    table = pd.DataFrame({"layer": [0, 1, 1, 2], "compliance": [0.1, 0.2, 0.5, 0.9]})
    by_block = lambda rows: rows.groupby("layer").compliance.max()  # noqa: E731
    assert onset(by_block(table), least=0.5) == 1 and onset(by_block(table), share=0.9, least=0.5) == 2
    assert onset(by_block(table[1:]), share=0.9, least=0.5) == 2
    assert onset(by_block(table[:2]), least=0.5) is None
    assert onset(by_block(table.assign(compliance=math.nan)), least=0.5) is None


COLUMNS = {"target": "success", "model": "name"}


def blocks(models=4, depth=12, seed=0):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {"name": np.repeat([f"m{i}" for i in range(models)], depth), "block": [*range(depth)] * models}
    )
    table["gap"], table["noise"] = rng.exponential(3, len(table)), rng.normal(size=len(table))
    return table.assign(success=np.clip(0.3 * np.log1p(table.gap) + 0.02 * rng.normal(size=len(table)), 0, 1))


def test_each_feature_is_ranked_inside_each_model():
    table = blocks()
    found = within_models(table, ["gap", "noise"], **COLUMNS)
    own = table[table.name == "m2"]
    assert found.loc["m2", "gap"] == pytest.approx(spearmanr(own.gap, own.success).statistic)
    assert (found.gap > 0.9).all() and (found.noise.abs() < 0.9).all()


def test_predictions_are_scikit_learns_on_the_other_models():
    table = blocks()
    found = leave_one_out(table, ["gap", "noise"], depth="block", **COLUMNS)
    own = table.name == "m1"
    scaler = StandardScaler().fit(np.log1p(table[~own][["gap", "noise"]].clip(lower=0)))
    x, new = (scaler.transform(np.log1p(t[["gap", "noise"]].clip(lower=0))) for t in (table[~own], table[own]))
    expected = Ridge(alpha=RIDGE).fit(x, table[~own].success).predict(new).clip(0, 1)
    np.testing.assert_allclose(found[own].predicted, expected, atol=1e-9)
    assert found.index.equals(table.index)


def test_a_models_own_success_does_not_enter_its_prediction():
    table = blocks()
    other = table.assign(success=np.where(table.name == "m3", 0.77, table.success))
    one, two = (leave_one_out(t, ["gap"], depth="block", **COLUMNS)[table.name == "m3"] for t in (table, other))
    pd.testing.assert_frame_equal(one[["predicted", AT_DEPTH]], two[["predicted", AT_DEPTH]])


def test_the_guess_to_beat_is_the_others_mean_at_that_block():
    table = blocks()
    found = leave_one_out(table, ["gap"], depth="block", **COLUMNS)
    row = found[(found.name == "m0") & (found.block == 5)].iloc[0]
    others = table[(table.name != "m0") & (table.block == 5)]
    assert row[AT_DEPTH] == pytest.approx(others.success.mean())
    scored = scores(found, **COLUMNS)
    assert (scored["predicted, Spearman"] > scored[f"{AT_DEPTH}, Spearman"]).all()
    assert scored.loc["m0", "predicted, error"] == pytest.approx(
        (found.predicted - found.success)[found.name == "m0"].abs().mean()
    )


def test_one_model_predicts_nothing():
    with pytest.raises(ReplibError, match="One model"):
        leave_one_out(blocks(models=1), ["gap"], depth="block", **COLUMNS)
