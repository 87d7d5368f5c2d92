"""How a model refuses, found from its own answers; and what cannot be concluded where it does not."""

import math

import pytest
import torch

from helpers import tiny
from helpers.tolerance import close
from replib.ablation import refusal_score as refusals
from replib.ablation.refusal_score import Answers, RefusalTokens, filtered_prompts, first_logits
from replib.core.errors import ReplibError
from replib.edits.apply import applied
from replib.models.load import load
from replib.transport.affine import AffineEdit

HARMFUL, HARMLESS = [f"w{i}" for i in range(10)], [f"w{i} w{i}" for i in range(10, 20)]
YES, NO = False, True


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


def answering(monkeypatch, harmful, harmless):
    """A model whose answers begin with these tokens and refuse or not: lists of (token, refused)."""
    told = {True: harmful, False: harmless}
    monkeypatch.setattr(refusals, "answers", lambda _m, prompts: Answers(*zip(*told[prompts is HARMFUL], strict=True)))


def find(model, **options):
    return RefusalTokens.find(model, HARMFUL, HARMLESS, **options)


def test_tokens_are_those_commoner_among_refusals_until_enough_are_covered(model, monkeypatch):
    harmful = [(7, NO)] * 5 + [(8, NO)] * 3 + [(9, NO)] + [(10, YES)]
    answering(monkeypatch, harmful, [(8, YES)] + [(9, YES)] * 9)
    found = find(model)
    assert found.ids == (7, 8) and found.words == ("w1", "w2")  # 9 begins answers more often than refusals
    assert found.coverage == pytest.approx(8 / 9) and found.overlap == pytest.approx(1 / 11)
    assert (found.n_refused, found.n_answered) == (9, 11)
    assert find(model, wanted=0.5).ids == (7,)


def test_a_model_that_refuses_nothing(model, monkeypatch):
    answering(monkeypatch, [(7, YES)] * 10, [(7, YES)] * 10)
    with pytest.raises(ReplibError, match="refuses none of 10 harmful .* nothing can be concluded about its safety"):
        find(model)


def test_a_model_that_refuses_everything(model, monkeypatch):
    answering(monkeypatch, [(7, NO)] * 10, [(7, NO)] * 10)
    with pytest.raises(ReplibError, match="refuses all of 10 harmless .* no direction between them"):
        find(model)


def test_refusals_that_begin_as_answers_do(model, monkeypatch):
    """As those of a model whose refusal is more than one token deep."""
    answering(monkeypatch, [(7, NO)] * 10, [(7, YES)] * 10)
    with pytest.raises(ReplibError, match="says nothing of refusal: judge whole answers"):
        find(model)


def tokens(*ids):
    return RefusalTokens(ids, tuple(map(str, ids)), 1.0, 0.0, 1, 1)


def test_the_score_is_the_log_odds_of_the_tokens():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.0, 0.0, 1.0]])
    found = tokens(0, 1).scores(p.log())
    assert found[:2].tolist() == pytest.approx([math.log(0.8 / 0.2), math.log(0.2 / 0.8)], abs=1e-6)
    assert found[2].item() == pytest.approx(math.log(1e-8) - math.log(1 + 1e-8))
    torch.testing.assert_close(tokens(2).scores(p.log()), -found, atol=1e-6, rtol=0)  # what is not one is the other


def test_first_logits_do_not_depend_on_the_batch(model):
    alone = torch.cat([first_logits(model, [p]) for p in HARMFUL])
    close(first_logits(model, HARMFUL, batch_size=4), alone)
    with applied(model, {1: AffineEdit.shift(torch.ones(16))}):
        assert not torch.allclose(first_logits(model, HARMFUL), alone)


def test_only_refused_harmful_and_answered_harmless_prompts_survive(model):
    p = first_logits(model, HARMFUL + HARMLESS).softmax(-1).mean(0)
    order = p.argsort()
    half = tokens(*order[p[order].cumsum(0) < 0.5].tolist())  # about half of the probability: some above, some below
    scores = half.scores(first_logits(model, HARMFUL + HARMLESS))
    kept = filtered_prompts(model, HARMFUL, HARMLESS, half)
    assert 1 < len(kept.harmful) < 10 and 1 < len(kept.harmless) < 10
    assert [p in kept.harmful for p in HARMFUL] == (scores[:10] > 0).tolist()
    assert [p in kept.harmless for p in HARMLESS] == (scores[10:] < 0).tolist()
    assert kept.asked == (10, 10) and str(kept).startswith(f"{len(kept.harmful)} of 10 harmful prompts are refused")


def test_all_prompts_filtered_away(model):
    never = int(first_logits(model, HARMFUL).mean(0).argmin())
    with pytest.raises(ReplibError, match="0 of 10 harmful prompts are refused.* without the filter and say so"):
        filtered_prompts(model, HARMFUL, HARMLESS, tokens(never))
