"""The measurement of hardened models: its design, its rows, the worst edit and the verdict."""

import json
from collections import Counter

import numpy as np
import pytest

from replib.ablation.adaptive_attack import EDIT_ATTACKS, GOAL
from replib.experiments import hardening
from replib.experiments.hardening import ARMS, HARDENING_ASKED, HARDENING_SEEDS, HardeningRun, packed_run, runs
from replib.experiments.hardening_results import HardeningResults
from replib.figures.audit import pareto_hardening
from replib.figures.layers import layer_curves

TASKS = {"direct": "direct", "prefill": "prefill", "story": "attack", "harmless": "benign", "borderline": "benign",
         "copy": "skill"}  # fmt: skip
DEPTH = 3


def letters(rng, rate):
    return "".join("c" if x < rate else "r" for x in rng.random(HARDENING_ASKED))


def row(run, rate, benign):
    """An audit as the program makes it: answers at random, compliance at a rate."""
    rng = np.random.default_rng([run.seed, len(run.arm)])
    answers = {t: letters(rng, benign if k in ("benign", "skill") else rate) for t, k in TASKS.items()}
    cells = [(a, i, k) for a in EDIT_ATTACKS for i in range(DEPTH) for k in EDIT_ATTACKS[a].ks]
    return run._asdict() | {"answers": answers, "edits": [[*cell, letters(rng, rate)] for cell in cells]}


@pytest.fixture
def rows():
    rates = {"none": (0.9, 1.0), "hardening": (0.0, 1.0), "both": (0.0, 0.8), "repbend": (0.5, 1.0)}
    return {run: row(run, *rates[run.arm]) for run in runs() if run.arm in rates}


@pytest.fixture
def found(rows, tmp_path):
    tasks = [
        {"name": t, "kind": k, "n": HARDENING_ASKED} for t, k in (TASKS | dict.fromkeys(EDIT_ATTACKS, "edit")).items()
    ]
    lines = [packed_run(run, row, {"seconds": 1.0}) for run, row in rows.items()]
    path = tmp_path / "hardening.json"
    path.write_text(json.dumps({"tasks": tasks, "trials": [], "runs": lines, "model": "aligned"}))
    return HardeningResults.load(path)


def test_every_arm_has_every_seed_and_the_model_itself_one():
    assert Counter(r.arm for r in runs()) == {arm: 1 if arm == "none" else len(HARDENING_SEEDS) for arm in ARMS}
    assert len(HARDENING_SEEDS) >= 3 and runs()[0] == HardeningRun("none")


def test_the_worst_is_that_of_brute_force(rows, found):
    for arm in found.methods:
        for line, run in zip(found.worst(arm), [r for r in rows if r.arm == arm], strict=True):
            texts = [x for a, _, _, x in rows[run]["edits"] if a in GOAL] + [rows[run]["answers"]["prefill"]]
            assert line.sum() == max(t.count("c") for t in texts)


def test_a_packed_run_keeps_the_answers_of_the_worst_edit_of_all_and_of_each_block(rows):
    for run, given in rows.items():
        kept = packed_run(run, given, {})
        for a, (layer, k) in kept["worst"].items():
            texts = {(i, j): text for name, i, j, text in given["edits"] if name == a}
            assert kept["answers"][a] == texts[layer, k] and len(kept["blocks"][a]) == DEPTH
            assert texts[layer, k].count("c") == max(t.count("c") for t in texts.values())
            for i, text in enumerate(kept["blocks"][a]):
                assert text.count("c") == max(t.count("c") for (j, _), t in texts.items() if i == j)


def test_the_verdict_needs_low_attacks_and_kept_answers(found):
    assert [m for m in found.methods if found.reached(m)] == ["hardening"]
    lost = found.lost()
    assert lost.loc["hardening", "harmless"].startswith("0.0") or lost.loc["hardening", "harmless"].startswith("-0.0")
    assert float(lost.loc["RepBend + hardening", "harmless"].split()[0]) == pytest.approx(20, abs=8)


def test_the_table_has_every_attack_and_method(found):
    table = found.table()
    assert list(table.columns) == found.titles and len(table) == 3 + len(EDIT_ATTACKS)
    assert table.loc["PCA-OT, all tokens", "hardening"].startswith("0\xa0[0,\xa0")


def test_success_by_block_is_the_best_k_of_each(rows, found):
    curve = found.by_block("ot_all")["RepBend"]
    counts = np.zeros((len(HARDENING_SEEDS), DEPTH))
    for run in (r for r in rows if r.arm == "repbend"):
        for a, layer, _, text in rows[run]["edits"]:
            if a == "ot_all":
                counts[run.seed, layer] = max(counts[run.seed, layer], text.count("c"))
    np.testing.assert_allclose(curve.value, counts.mean(0) / HARDENING_ASKED)
    assert (np.array(curve.low) <= curve.value).all() and (curve.value <= np.array(curve.high)).all()
    assert curve.n == HARDENING_ASKED * len(HARDENING_SEEDS)


def test_figures_are_drawn_from_it(found):
    blocks = layer_curves(found.by_block("ot_all"), "attack success", "by block")
    assert {t.name for t in blocks.data} >= set(found.titles)
    assert "most successful" in pareto_hardening(found).layout.title.text


def test_a_run_in_words_names_its_worst_edits(rows):
    said = hardening.described(rows[HardeningRun("none")])
    assert said.startswith("aligned, seed 0: complied with") and "ot_all" in said
    assert hardening.described({"arm": "both", "seed": 1, "diverged": "x"}) == "RepBend + hardening, seed 1: diverged"
