"""The coefficient search: fronts by brute force, resumption, interruption, refusals."""

import math
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from replib.core.errors import Diverged, ReplibError
from replib.core.settings import Settings
from replib.defences.tuning import MAXIMISE, MINIMISE, RANGES, importances, pareto, ranges_around, tune
from replib.study.study import Study
from replib.study.training import study_objective


def bowl(*, alpha, beta, gamma):
    """A cheap stand-in for training: pushing harder lowers attacks, and costs compliance and KL."""
    push = alpha / (alpha + 0.1 * math.log1p(gamma))
    return {
        "attack_success": 1 - push,
        "harmless_compliance": 1 - push**2 * (1 - beta / 2),
        "kl": push / gamma,
    }


class Recorder:
    """Calls `bowl`, remembers the coefficients, and raises `error` at call number `at`."""

    def __init__(self, error=None, at=None):
        self.calls, self.error, self.at = [], error, at

    def __call__(self, **coefficients):
        if len(self.calls) == self.at:
            raise self.error
        self.calls.append(coefficients)
        return bowl(**coefficients)


def dominated(row, other, minimise, maximise):
    gains = [row[name] - other[name] for name in minimise] + [other[name] - row[name] for name in maximise]
    return all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)


@pytest.mark.parametrize("seed", range(5))
def test_pareto_agrees_with_comparing_every_pair(seed):
    values = np.random.default_rng(seed).integers(0, 5, size=(40, 3))  # few values: ties and doubles occur
    table = pd.DataFrame(values, columns=["a", "b", "c"], index=[f"row{i}" for i in range(40)])
    rows = [row for _, row in table.iterrows()]
    expected = [row.name for row in rows if not any(dominated(row, o, ["a", "b"], ["c"]) for o in rows)]
    assert list(pareto(table, minimise=["a", "b"], maximise=["c"]).index) == expected


def test_pareto_of_one_column_is_its_extreme_rows():
    table = pd.DataFrame({"a": [3, 1, 2, 1]})
    assert list(pareto(table, minimise=["a"]).index) == [1, 3]
    assert list(pareto(table, maximise=["a"]).index) == [0]


@pytest.mark.parametrize(
    ("table", "names"),
    [
        (pd.DataFrame({"a": [1.0]}), ["b"]),
        (pd.DataFrame({"a": [1.0]}), []),
        (pd.DataFrame({"a": [math.nan]}), ["a"]),
    ],
)
def test_pareto_refuses_unknown_columns_and_nan(table, names):
    with pytest.raises(ReplibError):
        pareto(table, minimise=names)


def test_every_trial_lies_in_its_range_and_the_table_holds_what_was_measured(tmp_path):
    record = Recorder()
    result = tune(record, trials=12, storage=tmp_path / "deep" / "search.journal")
    assert result.table[list(RANGES)].to_dict("records") == record.calls
    for name, (low, high) in RANGES.items():
        assert result.table[name].between(low, high).all()
    for row in result.table.to_dict("records"):
        expected = bowl(**{name: row[name] for name in RANGES})
        assert {name: row[name] for name in expected} == expected
    assert 1 <= len(result.front) <= 12
    assert result.front.equals(pareto(result.table, minimise=MINIMISE, maximise=MAXIMISE))


def test_draws_are_uniform_in_the_logarithm(tmp_path):
    table = tune(
        lambda **_: {"attack_success": 0.0, "harmless_compliance": 0.0, "kl": 0.0},
        trials=10,
        storage=tmp_path / "s",
        ranges={**RANGES, "gamma": (1e-6, 1e6)},
    ).table
    assert (table.gamma < 1).sum() in range(1, 10)  # a draw uniform in gamma itself is never below 1


def test_a_search_in_two_sittings_equals_one_in_one(tmp_path):
    whole, parts = Recorder(), Recorder()
    tune(whole, trials=14, storage=tmp_path / "whole", seed=5)
    tune(parts, trials=4, storage=tmp_path / "parts", seed=5)
    result = tune(parts, trials=14, storage=tmp_path / "parts", seed=5)
    assert parts.calls == whole.calls
    assert list(result.table.trial) == list(range(14))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_an_interrupted_search_keeps_what_is_done_and_goes_on_from_there(tmp_path, error):
    broken, whole = Recorder(error, at=11), Recorder()
    with pytest.raises(type(error)):
        tune(broken, trials=14, storage=tmp_path / "s")
    assert len(tune(broken, trials=0, storage=tmp_path / "s").table) == 11
    broken.at = None
    tune(broken, trials=14, storage=tmp_path / "s")
    tune(whole, trials=14, storage=tmp_path / "whole")
    assert broken.calls == whole.calls


def test_a_trial_that_diverges_is_pruned_and_the_search_goes_on_the_same_way_in_two_sittings(tmp_path):
    calls = {"whole": [], "parts": []}

    def objective(name):
        def measure(**coefficients):
            calls[name].append(coefficients)
            if len(calls[name]) % 4 == 2:
                raise Diverged("the loss is nan")
            return bowl(**coefficients)

        return measure

    whole = tune(objective("whole"), trials=14, storage=tmp_path / "whole")
    tune(objective("parts"), trials=6, storage=tmp_path / "parts")
    parts = tune(objective("parts"), trials=14, storage=tmp_path / "parts")
    assert calls["parts"] == calls["whole"] and len(calls["whole"]) == 14
    assert whole.pruned == parts.pruned == 4 and len(whole.table) == 10
    assert whole.table.equals(parts.table) and 1 not in set(whole.table.trial)


def test_importances_find_the_coefficient_that_does_the_work(tmp_path):
    found = tune(lambda **c: {"attack_success": math.log(c["alpha"]), "kl": c["beta"], "harmless_compliance": 1.0},
                 trials=25, storage=tmp_path / "s")  # fmt: skip
    shares = importances(found)
    assert shares["attack_success"].idxmax() == "alpha" and shares["kl"].idxmax() == "beta"
    assert shares["attack_success"].sum() == pytest.approx(1)
    assert not shares["harmless_compliance"].any()


def test_a_study_is_searched_end_to_end_and_a_second_call_trains_nothing(tmp_path):
    study = Study.open(Settings(out=tmp_path, limit=4))
    bend, config = study.preset()
    objective = study_objective(study, bend, replace(config, steps=1, contrasts=2, retain=2))
    ranges = ranges_around(bend)
    assert ranges["alpha"] == pytest.approx((0.008, 0.8))
    found = tune(objective, trials=1, storage=tmp_path / "s", ranges=ranges)
    assert {"attack_success", "harmless_compliance", "kl", "borderline", "step"} <= set(found.table)
    assert study.model.adapter is None
    again = tune(lambda **_: 1 / 0, trials=1, storage=tmp_path / "s", ranges=ranges)
    assert again.table.equals(found.table)


def test_a_finished_search_runs_nothing_and_seeds_differ(tmp_path):
    first, again, other = Recorder(), Recorder(), Recorder()
    table = tune(first, trials=3, storage=tmp_path / "s", seed=1).table
    assert tune(again, trials=3, storage=tmp_path / "s", seed=1).table.equals(table)
    assert again.calls == []
    tune(other, trials=3, storage=tmp_path / "other", seed=2)
    assert other.calls != first.calls


def test_further_numbers_stand_beside_the_objectives(tmp_path):
    table = tune(lambda **c: {**bowl(**c), "borderline": c["alpha"]}, trials=2, storage=tmp_path / "s").table
    assert list(table.borderline) == list(table.alpha)


def test_two_searches_are_not_mixed_in_one_file(tmp_path):
    tune(bowl, trials=1, storage=tmp_path / "s", seed=1)
    with pytest.raises(ReplibError, match="seed"):
        tune(bowl, trials=2, storage=tmp_path / "s", seed=2)
    with pytest.raises(ReplibError, match="ranges"):
        tune(bowl, trials=2, storage=tmp_path / "s", seed=1, ranges={**RANGES, "alpha": (0.1, 0.2)})


@pytest.mark.parametrize(
    "measured",
    [
        {"attack_success": 0.1, "kl": 0.1},
        {"attack_success": 0.1, "kl": math.nan, "harmless_compliance": 1.0},
        {"attack_success": 0.1, "kl": math.inf, "harmless_compliance": 1.0},
    ],
)
def test_an_objective_that_returns_no_usable_numbers_is_refused_by_name(tmp_path, measured):
    with pytest.raises(ReplibError, match="objective returned"):
        tune(lambda **_: measured, trials=1, storage=tmp_path / "s")
    assert tune(bowl, trials=0, storage=tmp_path / "s").table.empty


@pytest.mark.parametrize(
    "ranges", [{**RANGES, "alpha": (0.0, 1.0)}, {**RANGES, "beta": (2.0, 1.0)}, {"alpha": (1.0, 2.0)}]
)
def test_ranges_without_a_logarithm_are_refused(tmp_path, ranges):
    with pytest.raises(ReplibError, match="ranges"):
        tune(bowl, trials=1, storage=tmp_path / "s", ranges=ranges)


def test_a_storage_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReplibError, match="writable"):
        tune(bowl, trials=1, storage=tmp_path / "file" / "search.journal")


def test_without_optuna_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ReplibError, match=r"replib\[tune\]"):
        tune(bowl, trials=1, storage=tmp_path / "s")
