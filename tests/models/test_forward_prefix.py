"""Prompts read up to their last token and finished from there: as if read at once, under every edit of that token."""

import pytest
import torch

from helpers import tiny
from replib.activations.capture import capture
from replib.edits.apply import applied
from replib.models.load import load
from replib.models.prefix_cache import CachedPrompts
from replib.transport.affine import AffineEdit

PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9 w10"]


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gemma2"])
def model(request, tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp(request.param), request.param))


def edits(model, seed):
    g = torch.Generator().manual_seed(seed)
    norm = capture(model, PROMPTS, layers=[1])[1].norm(dim=-1).mean()
    shift = lambda: AffineEdit.shift(norm * torch.randn(model.d_model, generator=g))  # noqa: E731
    return {1: shift(), ("attn_out", 2): shift()}


def finished(prefix, copies, tokens):
    batch, past = prefix.copies(copies)
    return prefix.model.replied(batch, tokens, past=past)


def test_logits_and_answers_are_those_of_reading_at_once(model):
    prefix, groups = CachedPrompts.read(model, PROMPTS), [edits(model, 0), {}, edits(model, 1)]
    batch = model.encode(PROMPTS * 3)
    with torch.no_grad(), applied(model, groups):
        expected = model.forward(batch)[:, -1]
        for found in (finished(prefix, 3, 6), model.replied(batch, 6), model.replied(batch, 1)):
            torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)
        assert finished(prefix, 3, 6)[1] == model.complete(batch, 6)
    assert not torch.allclose(expected[:3], expected[3:6], atol=1e-2)


def test_an_answer_that_ends_at_once_is_empty(model, monkeypatch):
    prefix = CachedPrompts.read(model, PROMPTS)
    first = finished(prefix, 1, 1)[0].argmax(-1).tolist()
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", [first[0], 10**6])
    answers = finished(prefix, 1, 5)[1]
    whole = model.complete(model.encode(PROMPTS), 5)
    assert answers == whole and len(answers[0].split()) <= 1


def test_a_prompt_of_one_token_has_no_prefix(model):
    model.template, template = None, model.template
    try:
        assert CachedPrompts.read(model, ["w1 w2 w3", "w4 w5"]).complete
        assert not CachedPrompts.read(model, ["w1 w2 w3", "w4"]).complete
    finally:
        model.template = template


@pytest.mark.parametrize("kind", ["lfm2", "falcon_h1"])
def test_a_hybrid_model_has_no_prefix_that_can_be_shared(kind, tmp_path):
    """Its recurrent states, in blocks of their own or beside the attention, cannot be copied row by row."""
    hybrid = load(tiny.save_model(tmp_path, kind))
    assert not CachedPrompts.read(hybrid, PROMPTS).complete
