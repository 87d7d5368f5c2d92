"""What edits do besides: nothing where nothing is edited, the same as measured by hand, and undone."""

import pytest
import torch

from helpers import tiny
from replib.ablation.damage import DamageMeter, DamageSets
from replib.audit.audit import rates
from replib.audit.judges import Outcome
from replib.core.errors import ReplibError
from replib.data.prompts import Prompt
from replib.edits.apply import applied
from replib.models.load import load
from replib.transport.affine import AffineEdit

HARMLESS, BORDERLINE = [Prompt(f"w{i} w{i + 1}") for i in range(6)], [Prompt(f"w{i} w9 w{i}") for i in range(10, 15)]
TEXTS = [" ".join(f"w{(7 * i + j * j) % 40}" for j in range(40)) for i in range(3)]
ASIDE = DamageSets({"harmless": HARMLESS, "borderline": BORDERLINE}, TEXTS, tokens=5)


class ByLength:
    """Judges by the number of different words: random models do not refuse by phrases."""

    name = "length"

    def __call__(self, prompts, responses):
        return [list(Outcome)[len(set(text.split())) % 3] for text in responses]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def gauge(model):
    return DamageMeter(model, ASIDE, ByLength(), max_new_tokens=6)


def edit(model):
    return {1: AffineEdit.shift(torch.randn(model.d_model, generator=torch.Generator().manual_seed(3)) * 5)}


def test_no_edit_is_no_damage(model, gauge):
    table = gauge(edit(model), positions="all", strength=0.0).set_index("metric")
    rates_, kl = table.filter(like=": ", axis=0), table.filter(like="KL", axis=0)
    assert len(rates_) == 6 and (rates_.unedited == rates_.edited).all() and (rates_.p == 1).all()
    assert (rates_.change_low < 0).all() and (rates_.change_high > 0).all()  # a few prompts do not prove it
    assert (kl[["edited", "low", "high"]] == 0).all(axis=None)
    factors = table.filter(like="perplexity", axis=0)
    assert (factors[["change", "change_low", "change_high"]] == 1).all(axis=None)
    assert (factors.unedited == factors.edited).all()


@pytest.mark.parametrize("positions", ["last_prompt", "all"])
def test_rates_are_those_of_the_edited_model(model, gauge, positions):
    table = gauge(edit(model), positions=positions).set_index("metric")
    with applied(model, edit(model), positions=positions):
        answers = model.generate([p.text for p in BORDERLINE], max_new_tokens=6)
    expected = rates(ByLength()(BORDERLINE, answers))
    for outcome in Outcome:
        row = table.loc[f"borderline: {outcome.value}"]
        assert (
            row.edited == expected[outcome.value]
            and row.n == 5
            and row.change == pytest.approx(row.edited - row.unedited)
        )
    assert table.loc["borderline: compliance", "low"] == pytest.approx(expected["low"])
    assert table.loc["KL on own answers, all tokens (nats)", "n"] == 6
    assert table.loc["perplexity of neutral text", "tokens"] == 3 * (40 - 32)
    assert table.notna().drop(columns=["p", "tokens"]).all(axis=None)


def test_what_acts_while_an_answer_is_written_acts_while_it_is_read(model, gauge):
    """As a prefill alone an answer that is forced would meet no ``decode`` edit, and look undamaged."""
    decode, response = (gauge(edit(model), positions=p).set_index("metric") for p in ("decode", "response"))
    kl = "KL on own answers, all tokens (nats)"
    assert decode.loc[kl, "edited"] == response.loc[kl, "edited"] > 0
    assert decode.loc["KL on own answers, first token (nats)", "edited"] == 0


def test_the_model_is_left_as_it_was_and_the_unedited_side_is_found_once(model, monkeypatch):
    batch = model.encode(["w1 w2"])
    with torch.no_grad():
        before = model.forward(batch)
        gauge = DamageMeter(model, ASIDE, ByLength(), max_new_tokens=6)
        first = gauge(edit(model))
        monkeypatch.setattr("replib.ablation.damage.TeacherForced.own", lambda *_a, **_k: pytest.fail("read again"))
        assert gauge(edit(model)).equals(first)
        assert torch.equal(model.forward(batch), before)


def test_damage_needs_harmless_prompts_and_no_empty_list():
    with pytest.raises(ReplibError, match="harmless prompts"):
        DamageSets({"borderline": BORDERLINE})
    with pytest.raises(ReplibError, match="no list may be empty"):
        DamageSets({"harmless": HARMLESS, "borderline": []})
    assert len({str(a.hashes()) for a in (ASIDE, DamageSets(ASIDE.prompts), DamageSets(ASIDE.prompts, TEXTS))}) == 3
