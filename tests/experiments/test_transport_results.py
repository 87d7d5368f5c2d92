"""The audit of defended models, read back: every rate is that of its letters, every interval that of its matrix."""

import json

import numpy as np
import pytest

from helpers.examined import LAYERS, PROMPTS, SEEDS, SIZES, STRENGTHS, examined
from replib.ablation.localisation import AT_DEPTH
from replib.core.errors import ReplibError
from replib.core.stats import two_way_interval, two_way_rate_interval
from replib.experiments.transport_results import TransportAudit


@pytest.fixture(scope="module")
def found():
    return examined()


def complied(texts):
    return np.array([[letter == "c" for letter in text] for text in texts], float)


def test_success_by_block_is_that_of_its_letters(found):
    curve = found.by_block("strong")
    for block in (0, 3, 5):
        matrix = complied([s["blocks"]["refitted"][block] for s in found.subjects if s["name"] == "strong"])
        assert curve.value[block] == matrix.mean() and curve.n[block] == 3 * PROMPTS
        assert (curve.low[block], curve.high[block]) == two_way_rate_interval(matrix)
    assert np.max(found.by_block("aligned", "transferred").value) == 0


def test_the_share_that_holds_counts_prompts_that_nothing_flips(found):
    least, curve = found.least("strong"), found.holding("strong")
    assert least.shape == (SEEDS["strong"], PROMPTS) and list(curve.at) == STRENGTHS
    assert list(curve.value) == [np.mean(least > s) for s in STRENGTHS]
    assert list(curve.value)[-1] == np.isinf(least).mean()


def test_draws_of_one_number_of_prompts_are_averaged(found):
    curve, (answer,) = found.samples("aligned"), found.answers("aligned", "samples")
    assert list(curve.at) == SIZES
    assert curve.value == pytest.approx([complied(answer[str(n)]).mean() for n in SIZES])


def test_token_depth_is_held_against_the_prompts_end(found):
    table = found.tokens("strong").set_index("kind")
    kinds = [s["tokens"]["kinds"] for s in found.subjects if s["name"] == "strong"]
    one, other = (complied([k[name]["test"] for k in kinds]) for name in ("prompt + token 1", "prompt"))
    row = table.loc["prompt + token 1"]
    assert row.value == one.mean() and row.more == pytest.approx((one - other).mean())
    assert (row.more_low, row.more_high) == two_way_interval(one - other)
    assert row.chosen == 3 / 16 and table.more["prompt"] == 0


def test_nulls_of_the_edit(found):
    table = found.shares("strong").set_index("variant")
    assert table.value["random_labels"] == 0 and table.less["full"] == 0 and set(table.n) == {3 * PROMPTS}


def test_every_block_of_every_model_is_predicted_from_the_others(found):
    table, scored = found.predicted()
    assert len(table) == LAYERS * sum(SEEDS.values()) and set(scored.index) == {"Aligned", "Planted", "Strong"}
    row = table[(table.title == "Strong") & (table.block == 5)].iloc[0]
    others = [np.mean(complied([s["blocks"]["refitted"][5]])) for s in found.subjects[1:3]]
    assert row[AT_DEPTH] == pytest.approx(np.mean(others))
    assert found.ranked().shape == (3, 8)


def test_places_are_held_against_the_planted_ones(found):
    table = found.places().set_index("method")
    assert set(table.model) == {"planted"} and table.error["logit lens"] == 0 and table.found["logit lens"] == 3
    assert np.isnan(table.error["ActAdd"])  # it never succeeds
    assert table.found["gap, largest"] == LAYERS - 1 and table.error["gap, largest"] == 2


def test_gaps_are_means_over_seeds_beside_their_null(found):
    curve = found.gap("strong", "answer")
    assert np.asarray(curve.value)[-1] == pytest.approx(0.2) and np.asarray(curve.high) == pytest.approx([0.1] * LAYERS)


def test_in_short(found):
    table = found.summary()
    assert list(table.index) == ["Aligned", "Planted", "Strong"] and table.seeds.tolist() == [1, 1, 3]
    assert (table["at"] == "prompt + token 1").all() and table["no edit"].str.startswith("0\xa0[").all()
    strong = complied([s["blocks"]["refitted"][4] for s in found.subjects if s["name"] == "strong"])
    assert table.refitted["Strong"].startswith(f"{100 * strong.mean():.0f}\xa0[")


def test_a_file_comes_back(found, tmp_path):
    path = tmp_path / "transport_audit.json"
    path.write_text(json.dumps({"subjects": found.subjects} | found.about))
    again = TransportAudit.load(path)
    assert again.names("gaps") == ["base", *SEEDS] and again.names("tokens") == [*SEEDS]
    assert again.summary().equals(found.summary())


def test_what_is_not_there_is_said(found):
    with pytest.raises(ReplibError, match="'base' was not asked about tokens: choose from aligned, planted, strong"):
        found.tokens("base")
