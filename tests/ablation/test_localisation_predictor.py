"""Vulnerability from label-free features: ranks within models, and predictions that have not seen their own model."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from replib.ablation.localisation import AT_DEPTH, RIDGE, leave_one_out, scores, within_models
from replib.core.errors import ReplibError

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
