"""The comparison of the defences: its design, its rows, its intervals and its table."""

import math
from copy import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

from replib.core.errors import ReplibError
from replib.core.settings import Settings, data_dir
from replib.core.stats import two_way_interval, two_way_rate_interval, wilson
from replib.core.storage import Rows, finished
from replib.defences import organism_grid as contenders
from replib.defences.catalogue import DEFENCES
from replib.defences.organism_grid import CHOSEN, CONTENDERS, ORGANISM
from replib.defences.repbend.objective import RepBend
from replib.experiments import comparison, defence_runs, runner
from replib.experiments.comparison import SEEDS, ComparisonJob, choice, comparison_on, finals, trials
from replib.experiments.comparison_results import MEASURES, DefenceComparison
from replib.experiments.defence_runs import Bench, Run
from replib.figures.audit import pareto_defences
from replib.models.load import load


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return Bench(Settings(out=tmp_path_factory.mktemp("opened")))


@pytest.fixture
def bench(opened, tmp_path):
    """A bench on which nothing is done yet."""
    fresh = copy(opened)
    fresh.folder = tmp_path
    return fresh


# --------------------------------------------------------------------------------------------- intervals
def test_the_interval_is_its_formula_written_out():
    values = np.random.default_rng(0).integers(0, 2, (5, 12)).astype(float)
    rows = [sum(r) / 12 for r in values]
    columns = [sum(values[i][j] for i in range(5)) / 5 for j in range(12)]
    mean = sum(rows) / 5
    a = sum((x - mean) ** 2 for x in rows) / 4 / 5
    b = sum((x - mean) ** 2 for x in columns) / 11 / 12
    half = student.ppf(0.975, (a + b) ** 2 / (a**2 / 4 + b**2 / 11)) * math.sqrt(a + b)
    assert two_way_interval(values) == pytest.approx((mean - half, mean + half))


def test_one_seed_leaves_the_interval_of_a_mean_over_prompts():
    values = np.array([[0.0, 1.0, 1.0, 0.0, 1.0, 1.0]])
    half = student.ppf(0.975, 5) * values.std(ddof=1) / math.sqrt(6)
    assert two_way_interval(values) == pytest.approx((values.mean() - half, values.mean() + half))


def test_where_nothing_varies_the_interval_is_that_of_one_seed():
    assert two_way_rate_interval(np.zeros((5, 64))) == wilson(0, 64) and two_way_rate_interval(
        np.ones((5, 64))
    ) == wilson(64, 64)
    assert two_way_interval(np.full((5, 64), -0.25)) == (-0.25, -0.25)


def test_the_interval_covers_the_truth_for_other_seeds_and_prompts():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(400):
        logits = rng.normal(size=(5, 1)) + rng.normal(size=(1, 40)) * 1.5
        low, high = two_way_rate_interval((rng.random((5, 40)) < 1 / (1 + np.exp(-logits))).astype(float))
        hits += low <= 0.5 <= high
    assert 0.93 <= hits / 400 <= 0.995


# --------------------------------------------------------------------------------------------- the design
def test_every_method_is_compared_with_five_seeds(bench):
    runs = finals(bench)
    assert [r.method for r in runs if not r.seed] == list(CONTENDERS)
    for name in CONTENDERS:
        assert [r.seed for r in runs if r.method == name] == ([0] if name == "none" else list(SEEDS))
    assert len(SEEDS) == 5 and set(DEFENCES) - {"whp_retain"} <= set(CONTENDERS)  # it is a point of whp's grid


def test_every_rival_is_tried_at_several_points_and_all_train_as_long(bench):
    counts = pd.Series([r.method for r in trials()]).value_counts()
    assert set(counts.index) == set(CONTENDERS) - {"none", "prompting", "repbend"} and counts.min() >= 2
    configs = [rival.config for c in CONTENDERS.values() for rival in c.grid]
    assert {(c.steps, c.probe_every, c.save_every) for c in configs} == {(40, 10, 0)}
    assert len({bench.key(r) for r in trials()}) == len(trials())


def test_seeds_reach_batches_and_what_a_method_draws():
    assert Run("sft", seed=3).rival.config.seed == 3 and Run("none").rival is None
    assert Run("rmu", seed=3).rival.objective.seed == 3


def test_what_a_rival_learns_holds_answers_to_harmless_requests(bench):
    data = bench.rivals
    refusals = [d for d in data.safe if d.label == "harmful"]
    assert len(data.safe) - len(refusals) == round(contenders.BENIGN * len(refusals))
    assert set(data.safe) - set(refusals) <= set(data.retain)
    assert data.retain is bench.study.bend_data.retain


def test_the_cost_is_said_before_it_is_paid_and_falls_with_what_is_done(bench):
    experiment = comparison_on(bench)
    before = experiment.minutes()
    assert 60 <= before <= 150
    rows = Rows(bench.folder / "part-1.jsonl")
    rows.put(bench.key(Run("sft")), {"score": -0.5})
    assert experiment.minutes() == pytest.approx(before - (CONTENDERS["sft"].seconds + comparison.PROBING) / 60)


def test_validation_chooses_and_a_finished_row_is_not_made_again(bench):
    rows = Rows(bench.folder / "part-2.jsonl")
    for trial, score in enumerate((-0.4, -0.1)):
        rows.put(bench.key(Run("sft", trial)), {"score": score})
    rows.put(bench.key(Run("dpo")), {"score": None, "diverged": "no number"})
    assert choice(bench)["sft"] == 1 and choice(bench)["dpo"] == 0
    experiment = comparison_on(bench)
    jobs = [ComparisonJob(run, audit) for run in (Run("sft", 1), Run("dpo")) for audit in (False, True)]
    assert experiment.missing(jobs) == [ComparisonJob(Run("sft", 1), audit=True)]
    rows.put(bench.key(Run("sft", 1), audited=True), {"answers": {}})
    assert not experiment.missing(jobs)


def test_the_values_for_the_organism_are_those_that_validation_chose():
    assert set(ORGANISM) == {name for name, c in CONTENDERS.items() if c.grid}
    if (data_dir() / "organism" / "comparison.json").exists():
        found = DefenceComparison.load()
        assert found.about["chosen"] == CHOSEN
        assert found.about["fingerprint"] == load("aligned").provenance()["fingerprint"]
        assert found.methods == list(CONTENDERS)


@pytest.mark.slow
def test_a_method_is_trained_audited_packed_and_gone_on_with(tmp_path, monkeypatch):
    few = {name: CONTENDERS[name] for name in ("none", "prompting", "rmu", "repbend")}
    for name in ("rmu", "repbend"):
        grid = tuple(r._replace(config=replace(r.config, steps=2, contrasts=2, retain=2)) for r in few[name].grid[:2])
        few[name] = few[name]._replace(grid=grid)
    for module in (defence_runs, comparison):
        monkeypatch.setattr(module, "CONTENDERS", few)
    monkeypatch.setattr(comparison, "SEEDS", range(2))
    monkeypatch.setattr(defence_runs, "PROBED", 2)
    monkeypatch.setattr(defence_runs, "ASKED", 3)
    monkeypatch.setattr(runner, "recorded_file", lambda name: tmp_path / f"{name}.json")
    bench = Bench(Settings(out=tmp_path))
    experiment = comparison_on(bench)
    with pytest.raises(ReplibError, match=r"run python -m replib\.experiments\.comparison first"):
        experiment.pack()
    experiment.run(2, 2)
    done = finished(bench.folder)
    experiment.run(1, 2)
    assert finished(bench.folder) == done and not experiment.minutes()
    found = DefenceComparison.load(experiment.pack())
    assert found.methods == list(few) and set(found.trials.method) == {"rmu"}
    assert found.matrix("repbend", "attack").shape == (2, 3) and found.runs.parameters.max() > 5e5
    assert isinstance(few["repbend"].grid[0].objective, RepBend)


# --------------------------------------------------------------------------------------------- the table
TASKS = [("story", "attack"), ("game", "attack"), ("direct", "direct"), ("seen one", "seen"), ("prefill", "prefill"),
         ("harmless", "benign"), ("borderline", "benign"), ("copy", "skill"), ("count", "skill")]  # fmt: skip


def standings():
    """Two seeds of two defences and the model itself, four prompts a task."""
    flat = {name: "rrrr" if kind in ("direct", "attack", "seen", "prefill") else "cccc" for name, kind in TASKS}
    rows = [("none", 0, {"story": "cccc", "game": "ccrr"}), ("sft", 0, {"story": "crrr", "count": "ccdd"}),
            ("repbend", 0, {"game": "dddd"}), ("sft", 1, {}), ("repbend", 1, {"borderline": "rccc"})]  # fmt: skip
    runs = [
        {"method": name, "title": name.upper(), "seed": seed, "answers": flat | answers, "seconds": 60 * seed,
         "parameters": 7}
        for name, seed, answers in rows
    ]  # fmt: skip
    tasks = pd.DataFrame([{"name": name, "kind": kind, "n": 4} for name, kind in TASKS])
    return DefenceComparison(tasks, pd.DataFrame(runs), pd.DataFrame(), {})


def test_rates_are_means_over_the_answers_they_name():
    tidy = standings().tidy().set_index(["method", "measure"])
    assert tidy.value["none", "attack"] == 0.75 and tidy.value["sft", "attack"] == 1 / 16
    assert tidy.value["repbend", "garbled"] == 4 / 40 and tidy.value["sft", "degenerate"] == 2 / 32
    assert tidy.value["repbend", "benign"] == 15 / 16 and tidy.value["repbend", "borderline"] == 7 / 8
    assert tidy.prompts["sft", "attack"] == 4 and tidy.prompts["sft", "skill"] == 8  # requests are shared, skills not
    assert set(MEASURES) | {name for name, _ in TASKS} <= set(tidy.index.get_level_values(1))
    assert (tidy.low <= tidy.value).all() and (tidy.value <= tidy.high).all()


def test_gaps_are_paired_by_seed_and_prompt():
    found = standings()
    assert found.gap("sft", "story").tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    assert found.gap("none", "game").tolist() == [[1, 1, 0, 0]] * 2
    runs = found.runs.drop(index=4)  # repbend has seed 0 alone
    assert replace(found, runs=runs).gap("sft", "story").shape == (2, 4)
    three = pd.concat([found.runs, found.runs[found.runs.seed == 1].assign(seed=2)])
    unequal = replace(found, runs=three[(three.method != "sft") | (three.seed != 1)])
    assert unequal.gap("sft", "story").shape == (2, 4)


def test_who_is_better_in_what_is_said_whichever_side_is_good():
    found = standings()
    flipped = found.runs.assign(
        answers=[a | {"copy": "rrrr", "count": "rrrr", "story": "rrrr"} if m == "repbend" else a
                 for m, a in zip(found.runs.method, found.runs.answers, strict=True)]
    )  # fmt: skip
    better = replace(found, runs=flipped).beats().set_index("method").measure
    assert {"copy", "skill"} <= set(better["none"]) and not set(better["none"]) & {"story", "attack"}
    assert "repbend" not in better.index and found.beats("none").method.eq("repbend").any()
    assert "attack" in set(found.beats("none").measure)


def test_the_table_has_a_row_a_defence_and_the_figure_a_name():
    found = standings()
    wide = found.wide()
    assert list(wide.index) == ["NONE", "SFT", "REPBEND"] and wide.seeds.tolist() == [1, 2, 2]
    assert wide["mean attack success"]["NONE"].startswith("75\N{NO-BREAK SPACE}[") and wide.seconds["SFT"] == 30
    assert {"story", "prefill", "skills", "parameters"} <= set(wide.columns)
    figure = pareto_defences(found)
    assert {note.text for note in figure.layout.annotations} == set(found.titles)
    heights = sorted(note.ay for note in figure.layout.annotations)
    assert min(np.diff(heights)) > 0.07 and heights[-1] < figure.layout.yaxis.range[1]
    assert pareto_defences(found, "skill").layout.xaxis.title.text == "skills"
