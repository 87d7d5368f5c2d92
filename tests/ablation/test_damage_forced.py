"""Texts and answers read by force: exact divergences, in any batch and stretch, with edits where they belong."""

import math

import pytest
import torch

from helpers import tiny
from replib.ablation.damage import TeacherForced, token_kl
from replib.ablation.refusal_score import first_logits
from replib.core.errors import ReplibError
from replib.core.stats import mean_over, perplexity
from replib.edits.apply import applied
from replib.models import forward as passes
from replib.models.load import load
from replib.transport.affine import AffineEdit

PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9 w10"]
TEXTS = [" ".join(f"w{(3 * i + j) % 40}" for j in range(n)) for i, n in enumerate((20, 9, 14, 4))]


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request, tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp(request.param), request.param))


def edit(model, layer=1):
    return {layer: AffineEdit.shift(torch.randn(model.d_model, generator=torch.Generator().manual_seed(3)) * 5)}


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def test_the_divergence_is_that_of_the_distributions():
    base, edited = logits(5, 11), logits(5, 11, seed=1)
    p, q = (torch.distributions.Categorical(logits=x) for x in (base, edited))
    torch.testing.assert_close(token_kl(base, edited), torch.distributions.kl_divergence(p, q))
    torch.testing.assert_close(token_kl(base, edited + 7), token_kl(base, edited))  # known up to a constant


def test_suppressed_tokens_add_nothing_and_no_nan():
    base, edited = logits(4, 11), logits(4, 11, seed=1)
    kept = [0, 1, 2, 4, 5, 6, 7, 8, 9]
    expected = token_kl(base[:, kept], edited[:, kept])
    base[:, [3, 10]] = edited[:, [3, 10]] = -torch.inf
    torch.testing.assert_close(token_kl(base, edited), expected)
    edited[0, 0] = -torch.inf  # what the edit alone forbids
    assert token_kl(base, edited).tolist()[0] == math.inf and token_kl(base, edited)[1:].isfinite().all()
    assert token_kl(edited, base).isfinite().all()


def test_without_an_edit_nothing_moves_and_with_one_all_is_undone(model):
    forced = TeacherForced.own(model, PROMPTS, tokens=6)
    plain = forced.read()
    assert torch.equal(plain.base, plain.edited) and not plain.kl.any()
    with applied(model, edit(model)):
        assert forced.read().kl.max() > 1e-3
    assert torch.equal(forced.read().edited, plain.edited)


@pytest.mark.parametrize("positions", ["last_prompt", "response", "all"])
def test_every_token_is_that_of_a_plain_pass_over_the_same_rows(model, positions):
    forced = TeacherForced.own(model, PROMPTS, tokens=5)
    (batch,) = forced.batches
    with torch.no_grad():
        base = model.forward(batch)
        with applied(model, edit(model), positions=positions):
            edited, read = model.forward(batch), forced.read()
    at = batch.response_mask[:, 1:]
    tokens = batch.input_ids[:, 1:][at]
    torch.testing.assert_close(read.kl, token_kl(base[:, :-1][at], edited[:, :-1][at]), atol=1e-5, rtol=1e-4)
    expected = -edited[:, :-1][at].double().log_softmax(-1)[torch.arange(len(tokens)), tokens]
    torch.testing.assert_close(read.edited, expected, atol=1e-5, rtol=1e-4)


def test_the_first_token_is_decided_by_the_prompt(model):
    forced, before = TeacherForced.own(model, PROMPTS, tokens=4), first_logits(model, PROMPTS)
    with applied(model, edit(model)):
        read, after = forced.read(), first_logits(model, PROMPTS)
    torch.testing.assert_close(read.kl[read.first], token_kl(before, after), atol=1e-5, rtol=1e-4)
    assert read.row[read.first].tolist() == [0, 1, 2]
    with applied(model, edit(model), positions="response"):
        read = forced.read()
    assert not read.kl[read.first].any() and read.kl[~read.first].any()


@pytest.mark.parametrize("make", [TeacherForced.own, lambda *a, **o: TeacherForced.texts(*a, context=3, **o)])
def test_batches_and_stretches_change_nothing(model, make, monkeypatch):
    given = TEXTS if make is not TeacherForced.own else PROMPTS
    whole = make(model, given)
    with applied(model, edit(model)):
        expected = whole.read()
        one_by_one = make_without_edit(model, make, given)
        for got in (one_by_one.read(), (monkeypatch.setattr(passes, "LOGITS", 3 * 46), whole.read())[1]):
            assert torch.equal(got.row, expected.row) and torch.equal(got.first, expected.first)
            for a, b in zip(got[2:], expected[2:], strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def make_without_edit(model, make, given):
    """Edits are in place where this is called: the reading begins on another copy of the same weights."""
    twin = load(model.name)
    forced = make(twin, given, batch_size=1)
    return TeacherForced(model, forced.batches, forced.states)


def test_an_answer_is_read_to_its_end_and_the_end_is_counted(model, monkeypatch):
    long = TeacherForced.own(model, PROMPTS, tokens=6)
    third = int(long.batches[0].input_ids[0, -4])
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", [third])
    (batch,) = TeacherForced.own(model, PROMPTS, tokens=6).batches
    answer = batch.input_ids[0][batch.response_mask[0]]
    assert answer[-1] == third and (answer[:-1] != third).all() and len(answer) <= 3


def test_the_beginning_of_a_text_stands_as_its_prompt(model):
    forced = TeacherForced.texts(model, TEXTS, length=12, context=5)
    counted = [min(len(model.tokenizer(t)["input_ids"]), 12) - 5 for t in TEXTS]
    assert forced.read().row.bincount().tolist() == [n for n in counted if n > 0]
    with applied(model, edit(model)):  # the last token of the beginning
        assert forced.read().kl.max() > 0
    with pytest.raises(ReplibError, match="No text is longer than 50 tokens"):
        TeacherForced.texts(model, TEXTS, context=50)


def test_means_are_over_tokens_and_intervals_over_rows():
    row = torch.tensor([0, 0, 0, 1, 2, 2])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    found = mean_over(values, row)
    assert found.value == pytest.approx(3.5) and (found.tokens, found.rows) == (6, 3)
    assert 2.0 <= found.low < found.value < found.high <= 5.5  # of one row alone, at the most
    assert mean_over(values, row * 0).low == mean_over(values, row * 0).high == pytest.approx(3.5)
    flat = perplexity(torch.full((6,), math.log(40.0)), row)
    assert (flat.value, flat.low, flat.high) == pytest.approx((40, 40, 40))
