"""Two blocks: the greedy search looks at fewer pairs than all, at the same edits, and says what it missed."""

from itertools import combinations

import numpy as np
import pytest

from helpers import tiny
from helpers.sweeps import DATA
from replib.ablation.block_pairs import Search, greedy_against_all, shortfall
from replib.ablation.fit import Cell
from replib.ablation.refusal_score import FirstTokenScore, RefusalTokens
from replib.ablation.sweep import Sweeper
from replib.audit.judges import PhraseJudge
from replib.models.load import load

TOKENS = RefusalTokens((7, 9, 11), ("w1", "w3", "w5"), 1.0, 0.0, 10, 10)


@pytest.fixture(scope="module")
def sweeper(tmp_path_factory):
    model = load(tiny.save_model(tmp_path_factory.mktemp("llama"), num_hidden_layers=4))
    found = Sweeper(model, DATA, PhraseJudge(), max_new_tokens=4)
    found.screen = FirstTokenScore(TOKENS)
    return found


def before(table, pair):
    """What stands before a pair in an ordered table."""
    found = [tuple(x) for x in table["layers"]]
    return set(found[: found.index(pair)])


def sets(table):
    return {tuple(x) for x in table["layers"]}


@pytest.mark.parametrize("by", ["cheap", "log_odds", "compliance"])
def test_greedy_takes_the_best_block_and_its_best_partner(sweeper, by):
    search = Search(sweeper, k=1, positions="all", by=by)
    greedy, every = search.greedy(), search.exhaustive()
    assert sets(every) == set(combinations(range(4), 2)) and every.outcomes.eq("").all() == (by != "compliance")
    first = greedy[greedy["layers"].map(len) == 1].iloc[0].layer
    assert sets(greedy) == {(i,) for i in range(4)} | {p for p in combinations(range(4), 2) if first in p}
    found = every[every["layers"].map(lambda x: first in x)].iloc[0]
    assert list(greedy.iloc[0]["layers"]) == list(found["layers"])
    line = greedy_against_all(search)
    assert line["better pairs"] == sum(1 for x in every["layers"] if tuple(x) in before(every, line.greedy))
    assert line["pairs"] == 6 and line["scored by greedy"] == 7 and line.shortfall >= 0 >= line.low - 1e-9
    assert (line.greedy == line.best) == (line["better pairs"] == 0)


def test_some_blocks_alone_can_be_searched(sweeper):
    assert sets(Search(sweeper, k=1, layers=[0, -1, 1]).exhaustive()) == {(0, 1), (0, 3), (1, 3)}


def test_all_pairs_on_one_lower_block_read_its_activations_once(sweeper, monkeypatch):
    fresh = Sweeper(sweeper.model, DATA, PhraseJudge())
    fresh.screen, reads, captured = FirstTokenScore(TOKENS), [], fresh.fitter._captured
    monkeypatch.setattr(fresh.fitter, "_captured", lambda m, layers: reads.append(list(layers)) or captured(m, layers))
    together = Search(fresh, k=1).exhaustive()
    assert reads == [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3]]
    alone = Sweeper(sweeper.model, DATA, PhraseJudge(), batch_size=2)
    alone.screen = fresh.screen
    for row in together.itertuples():
        again = alone.table([Cell("pca_ot", tuple(row.layers), 1, "last_prompt")], best=0)
        np.testing.assert_allclose(again["each"][0], row.each, atol=1e-3)


def test_what_a_search_misses_is_measured_on_the_same_prompts():
    import pandas as pd

    one, best = (pd.Series({"each": x, "outcomes": o}) for x, o in (([0.0, 1, 2], "crr"), ([-1.0, 0, 1], "ccr")))
    assert shortfall(one, best, "log_odds") == {"shortfall": 1.0, "low": 1.0, "high": 1.0}
    assert shortfall(one, best)["shortfall"] == pytest.approx(1 / 3)
    assert shortfall(one, best, "compliance")["shortfall"] == pytest.approx(1 / 3)
    assert shortfall(best, best)["shortfall"] == 0
