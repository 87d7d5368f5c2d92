"""The cheap score: exact, absent where it would mislead, and no better than its agreement with answers says."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import tiny
from replib.ablation import refusal_score as refusals
from replib.ablation.fit import AblationData
from replib.ablation.refusal_score import Answers, FirstTokenScore, RefusalTokens
from replib.ablation.sweep import Sweeper
from replib.ablation.sweep_report import SweepReport, agreement
from replib.core.errors import ReplibError
from replib.data.prompts import Prompt
from replib.models.load import load

DATA = AblationData([f"w{i}" for i in range(10)], [f"w{i}" for i in range(10, 20)], [Prompt("w39")], ["w38"])
YES, NO = False, True
TOKENS = RefusalTokens((7, 8), ("w1", "w2"), 1.0, 0.0, 10, 10)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 4


def test_the_score_is_exact_where_the_sources_is_cut_off():
    x = logits(5, 46)
    p = x.double().softmax(-1)[:, [7, 8]].sum(-1)
    torch.testing.assert_close(TOKENS.log_odds(x), (p / (1 - p)).log())
    x[:, 7] += 100
    assert (TOKENS.log_odds(x) > 60).all() and TOKENS.scores(x).max() < 18.5
    torch.testing.assert_close(TOKENS.log_odds(x + 3), TOKENS.log_odds(x), atol=1e-4, rtol=0)


def test_a_row_has_the_mean_its_interval_and_every_prompt():
    row = FirstTokenScore(TOKENS).row(logits(9, 46), "all")
    assert row["log_odds"] == pytest.approx(np.mean(row["each"])) and len(row["each"]) == 9
    assert row["turned"] == np.mean([x < 0 for x in row["each"]])
    assert row["log_odds_low"] < row["log_odds"] < row["log_odds_high"] and row["coverage"] == 1.0


@pytest.mark.parametrize("positions", ["response", "decode"])
def test_edits_of_later_tokens_have_no_cheap_score(positions):
    assert set(FirstTokenScore(TOKENS).row(logits(9, 46), positions).values()) == {None}


@pytest.mark.parametrize(
    ("harmful", "harmless", "why"),
    [
        (
            [(7, NO)] * 5 + [(9, NO)] * 5,
            [(9, YES)] * 10,
            "Only 50 % of 10 refusals",
        ),  # half of them begin as answers do
        ([(9, NO)] * 10, [(9, YES)] * 10, "begin with the tokens that its answers begin with"),
        ([(9, YES)] * 10, [(9, YES)] * 10, "nothing can be concluded about its safety"),
        ([(7, NO)] * 10, [(7, NO)] * 10, "no direction between them"),
    ],
)
def test_where_the_first_token_says_too_little_there_is_none_and_why_is_said(
    model, monkeypatch, caplog, harmful, harmless, why
):
    told = iter((harmful, harmless))
    monkeypatch.setattr(refusals, "answers", lambda *_: Answers(*zip(*next(told), strict=True)))
    screen = FirstTokenScore.find(model, DATA.harmful, DATA.harmless)
    assert screen.tokens is None and why in caplog.text and "every edit is judged by whole answers" in caplog.text
    assert set(screen.row(logits(2, 46), "last_prompt").values()) == {None}


def table(odds, outcomes):
    """Rows of a sweep: each prompt's log-odds, and a letter an answer or none."""
    rate = lambda text: text.count("c") / len(text) if text else math.nan  # noqa: E731
    found = pd.DataFrame({"each": odds, "outcomes": outcomes, "kl": 0.1})
    return found.assign(log_odds=found.each.map(np.mean), compliance=found.outcomes.map(rate))


ODDS = [[5.0, 6, 7, 8], [1, 2, 3, 4], [-3, -2, -1, 0], [-9, -8, -7, -6]]
RISING = ["rrrr", "crrr", "ccrr", "cccc"]


def test_agreement_is_spearmans_over_edits():
    found = agreement(table(ODDS, RISING), best=2, draws=20)
    assert found.rho == pytest.approx(1) and (found.cells, found.prompts, found.missed) == (4, 4, 0)
    against = agreement(table(ODDS, RISING[::-1]), best=2, draws=20)
    assert against.rho == pytest.approx(-1) and against.missed == pytest.approx(0.75)
    assert agreement(table(ODDS, RISING[::-1]), best=4, draws=20).missed == 0
    assert -1 <= against.low <= against.high <= 1 and "Spearman -1.00" in str(against)


def test_edits_of_which_one_side_is_unknown_do_not_count():
    odds, outcomes = [*ODDS, [math.nan] * 4, [0.0] * 4], [*RISING, "rrrr", ""]
    assert agreement(table(odds, outcomes), draws=20) == agreement(table(ODDS, RISING), draws=20)
    with pytest.raises(ReplibError, match="2 edits have both"):
        agreement(table(ODDS[:2], RISING[:2]))


def test_where_every_edit_succeeds_alike_there_is_nothing_to_rank():
    found = agreement(table(ODDS, ["cccc"] * 4), draws=20)
    assert math.isnan(found.rho) and math.isnan(found.low) and found.missed == 0


def report(found):
    return SweepReport(object.__new__(Sweeper), found)


def test_the_worth_of_a_score_says_where_only_its_own_choice_was_answered():
    whole = report(table(ODDS, RISING)).worth()
    cut = report(table([*ODDS, [9.0] * 4], [*RISING, ""])).worth()
    assert "Spearman 1.00" in whole and "range is cut" not in whole
    assert "Of 5 edits only these 4 were answered" in cut and "range is cut" in cut
    assert "not known. 1 edits have both" in report(table(ODDS[:1], RISING[:1])).worth()
