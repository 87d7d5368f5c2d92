"""Edits re-fitted on a model: many in one pass are as many passes, each is fitted where it says, nothing is left."""

import pandas as pd
import pytest
import torch

from helpers import tiny
from replib.ablation.adaptive_attack import COLUMNS, EDIT_ATTACKS, AdaptiveAttack, success, success_by_block
from replib.activations.capture import capture
from replib.audit.judges import Outcome, encode_outcomes
from replib.core.errors import ReplibError
from replib.core.settings import Settings
from replib.core.stats import wilson
from replib.data.prompts import Prompt
from replib.data.splits import Splits
from replib.edits.apply import applied
from replib.edits.methods import fit_edit
from replib.models.load import load
from replib.study.study import Study

HARMFUL = [Prompt(f"w{i} w{i + 5}", "harmful", target=f"w{i} w33") for i in range(20)]
HARMLESS = [Prompt(f"w{i} w9 w3", "harmless", target=f"w{i} w8") for i in range(20)]
SCORED = [Prompt(f"w{i} w2 w1", "harmful", target="w30 w31") for i in range(3)]


class Noting:
    """Judges by a property of the text that edits change, and keeps what it read."""

    name = "noting"

    def __init__(self):
        self.read = []

    def __call__(self, prompts, responses):
        self.read += responses
        return [list(Outcome)[sum(map(ord, text)) % 3] for text in responses]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture
def attack(model):
    return AdaptiveAttack.on(model, HARMFUL, HARMLESS, SCORED, Noting(), tokens=4, batch_size=9)


def test_every_block_and_every_k_is_tried(attack, monkeypatch):
    monkeypatch.setattr(attack.sweeper, "outcomes", lambda cells: ["r"] * len(cells))
    assert len(attack.table()) == 3 * sum(len(a.ks) for a in EDIT_ATTACKS.values())
    assert attack.table(("ot_last", "rfa"), (1,), (2,)).to_numpy().tolist() == [["ot_last", 1, 2, "r"]]
    assert attack.table(("rfa",))[["layer", "k"]].to_numpy().tolist() == [[i, 0] for i in range(3)]


@pytest.mark.parametrize("name", ["ot_all", "rfa", "ot_response_prefilled"])
def test_many_edits_in_a_pass_are_each_by_itself(model, attack, name):
    table, how = attack.table((name,), ks=(0, 1, 8)), EDIT_ATTACKS[name]
    texts, begun = ([p.text for p in SCORED], [p.target if how.prefilled else "" for p in SCORED])
    for row in table.itertuples():
        x, y = (
            capture(model, [p.text for p in rows], responses=[p.target for p in rows], positions=how.read)
            for rows in (HARMFUL, HARMLESS)
        )
        edit = fit_edit(how.method, x[row.layer], y[row.layer], row.layer, k=max(row.k, 1), depth=3)
        with applied(model, edit, positions=how.positions):
            answers = model.generate(texts, max_new_tokens=4, prefills=begun)
        assert row.outcomes == encode_outcomes(Noting()(SCORED, answers))
    assert all(text.startswith("w30 w31" if how.prefilled else "") for text in attack.sweeper.judge.read)


def test_nothing_is_left_of_the_edits(model, attack):
    batch = model.encode(["w1 w2"])
    before = model.forward(batch)
    attack.table(("rfa", "ot_all"), ks=(0, 1))
    assert torch.equal(model.forward(batch), before)


def test_a_curve_is_of_the_best_k_of_each_block_with_its_interval():
    rows = [("ot_all", 0, 1, "crrr"), ("ot_all", 0, 2, "ccrr"), ("ot_all", 2, 1, "rrrr"), ("rfa", 1, 0, "cccc")]
    curve = success_by_block(pd.DataFrame(rows, columns=COLUMNS))
    assert list(curve) == ["PCA-OT, all tokens", "RFA, everywhere"]
    first = curve["PCA-OT, all tokens"]
    assert list(first.at) == [0, 2] and list(first.value) == [0.5, 0.0] and list(first.n) == [4, 4]
    assert (first.low[0], first.high[0]) == wilson(2, 4)


def test_success_is_the_share_that_complied():
    assert success("crdc") == 0.5 and success("rr") == 0


def test_prompts_that_fit_are_not_scored(model):
    study = Study(Settings(), model, Splits(HARMFUL, [], []), Splits(HARMLESS, [], []), Noting())
    with pytest.raises(ReplibError, match="1 scored prompts fit the edits"):
        study.adaptive_attack([HARMFUL[3], SCORED[0]])
    assert study.adaptive_attack(SCORED).sweeper.data.answers[0][1] == "w1 w33"
