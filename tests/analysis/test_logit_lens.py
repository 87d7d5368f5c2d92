"""The logit lens against transformers' own logits and literal arithmetic."""

import math
from importlib import import_module

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from helpers import tiny
from replib.analysis.logit_lens import compare, logit_lens
from replib.core.errors import ReplibError
from replib.models.load import load

lens = import_module("replib.analysis.logit_lens")  # the room names the function

PROMPT, RESPONSE = "w1 w2 w3 w4", "w5 w6 w7"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder):
    return load(str(folder))


@pytest.fixture(scope="module")
def bent(folder, tmp_path_factory):
    return load(str(folder), adapter=str(tiny.save_adapter(tmp_path_factory.mktemp("adapter"), folder)))


def input_ids(model):
    return torch.tensor([model.tokenizer(f"<s> {PROMPT} <end> <ask> {RESPONSE}")["input_ids"]])


@torch.no_grad()
def literal_probs(model, layer):
    """Unembed(norm(h)) of transformers' own hidden states, which are raw for all but the last block."""
    out = model.causal_lm(input_ids=input_ids(model), output_hidden_states=True)
    last = model.n_layers - 1
    logits = out.logits if layer == last else model.unembed(model.final_norm(out.hidden_states[layer + 1]))
    return logits[0].double().softmax(-1).numpy()


@pytest.mark.parametrize("kind", tiny.SIZES)
def test_the_last_row_is_the_models_own_prediction(kind, tmp_path):
    model = load(str(tiny.save_model(tmp_path, kind)))
    seen = logit_lens(model, PROMPT, RESPONSE, layers=[-1], top=len(model.tokenizer))
    own = literal_probs(model, model.n_layers - 1)
    placed = np.take_along_axis(
        own,
        np.array([[model.tokenizer.convert_tokens_to_ids(list(best)) for best in seen.top_tokens[0]]])[0],
        axis=-1,
    )
    np.testing.assert_allclose(seen.top_probs[0].numpy(), placed, atol=1e-6)
    np.testing.assert_allclose(seen.entropy[0].numpy(), entropy(own, axis=-1), atol=1e-5)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_every_measure_agrees_with_the_distribution_written_out(model, layer):
    seen = logit_lens(model, PROMPT, RESPONSE, layers=[layer], top=3)
    probs, ids = literal_probs(model, layer), input_ids(model)[0].tolist()
    np.testing.assert_allclose(seen.entropy[0].numpy(), entropy(probs, axis=-1), atol=1e-5)
    for t, p in enumerate(probs):
        best = sorted(range(len(p)), key=lambda i: -p[i])[:3]
        assert seen.top_tokens[0][t] == tuple(model.tokenizer.convert_ids_to_tokens(best))
        assert seen.top_probs[0, t].tolist() == pytest.approx([p[i] for i in best], abs=1e-6)
        if t + 1 < len(ids):
            assert seen.next_prob[0, t].item() == pytest.approx(p[ids[t + 1]], abs=1e-6)
            assert seen.next_rank[0, t].item() == sum(q > p[ids[t + 1]] for q in p)
    assert math.isnan(seen.next_prob[0, -1]) and seen.next_rank[0, -1] == -1


def test_tokens_words_and_layers_are_named(model):
    seen = logit_lens(model, PROMPT, RESPONSE, layers=[2, -3], top=2)
    assert seen.layers == (2, 0)
    assert seen.tokens == ("<s>", "w1", "w2", "w3", "w4", "<end>", "<ask>", "w5", "w6", "w7")
    assert seen.words == [[best[0] for best in row] for row in seen.top_tokens]
    swapped = logit_lens(model, PROMPT, RESPONSE, layers=[0, 2], top=2)
    assert torch.equal(seen.entropy, swapped.entropy.flip(0))


@pytest.mark.parametrize(
    ("span", "columns"), [("all", slice(0, 10)), ("prompt", slice(0, 7)), ("response", slice(6, 10))]
)
def test_a_span_is_a_window_of_the_whole(model, span, columns):
    whole, part = logit_lens(model, PROMPT, RESPONSE), logit_lens(model, PROMPT, RESPONSE, span=span)
    assert part.tokens == whole.tokens[columns]
    torch.testing.assert_close(part.entropy, whole.entropy[:, columns])
    torch.testing.assert_close(part.next_prob, whole.next_prob[:, columns], equal_nan=True)


def test_without_a_response_the_response_span_is_the_token_that_would_begin_it(model):
    assert logit_lens(model, PROMPT, span="response").tokens == ("<ask>",)


def test_chunks_bound_what_is_decoded_at_once_and_change_nothing(bent, monkeypatch):
    whole = compare(bent, PROMPT, RESPONSE, span="all")
    sizes = []
    hook = bent.unembed.register_forward_hook(lambda module, args, out: sizes.append(out.shape[:-1].numel()))
    monkeypatch.setattr(lens, "_LENS_CHUNK", 4)
    chunked = compare(bent, PROMPT, RESPONSE, span="all")
    hook.remove()
    forward_passes = [size for size in sizes if size == 10]
    assert len(forward_passes) == 2 and max(size for size in sizes if size != 10) == 4
    torch.testing.assert_close(chunked.js, whole.js, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(chunked.bent.entropy, whole.bent.entropy, atol=1e-5, rtol=1e-5)
    assert chunked.bent.top_tokens == whole.bent.top_tokens


def test_compare_reads_the_base_with_the_adapter_off_and_the_bent_model_with_it_on(model, bent):
    both = compare(bent, PROMPT, RESPONSE, span="all")
    alone, own = logit_lens(model, PROMPT, RESPONSE), logit_lens(bent, PROMPT, RESPONSE)
    torch.testing.assert_close(both.base.entropy, alone.entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both.bent.entropy, own.entropy, atol=1e-5, rtol=1e-5)
    assert (both.base.entropy - both.bent.entropy).abs().max() > 0.05
    assert both.base.provenance["adapter"] == "" and both.bent.provenance["adapter"] == bent.adapter


def test_js_is_scipys_squared_distance_in_nats(model, bent):
    both = compare(bent, PROMPT, RESPONSE, span="response")
    for row, layer in enumerate(both.base.layers):
        expected = jensenshannon(literal_probs(model, layer)[6:], literal_probs(bent, layer)[6:], axis=-1) ** 2
        np.testing.assert_allclose(both.js[row].numpy(), expected, atol=1e-5)
    assert both.js.shape == (3, 4)
    assert 0.001 < both.js.max() <= math.log(2)


def test_compare_refuses_a_model_without_an_adapter(model):
    with pytest.raises(ReplibError, match="no adapter"):
        compare(model, PROMPT, RESPONSE)


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()]


def test_the_model_is_left_as_it_was_even_when_reading_fails(bent, monkeypatch):
    before, weights = hooks(bent), {n: p.clone() for n, p in bent.model.named_parameters()}
    own = logit_lens(bent, PROMPT, RESPONSE).entropy
    monkeypatch.setattr(lens, "_check_decoding", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare(bent, PROMPT, RESPONSE)
    monkeypatch.undo()
    assert hooks(bent) == before
    assert all(torch.equal(p, weights[n]) for n, p in bent.model.named_parameters())
    assert torch.equal(logit_lens(bent, PROMPT, RESPONSE).entropy, own)  # the adapter is on again


def test_a_model_that_does_more_after_the_unembedding_is_refused_rather_than_misread(model):
    def doubled(module, args, out):
        out.logits = 2 * out.logits
        return out

    hook = model.causal_lm.register_forward_hook(doubled)
    with pytest.raises(ReplibError, match="cannot read"):
        logit_lens(model, PROMPT, RESPONSE)
    hook.remove()


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"layers": [3]}, "Layer 3"),
        ({"layers": []}, "Layer"),
        ({"span": "answer"}, "span"),
        ({"top": 0}, "top=0"),
        ({"top": 1000}, "top=1000"),
    ],
)
def test_badarguments_are_named(model, wrong, reason):
    with pytest.raises(ReplibError, match=reason):
        logit_lens(model, PROMPT, RESPONSE, **wrong)


def test_a_real_story_model_settles_on_the_story_as_depth_grows(shared_data):
    with pytest.warns(UserWarning, match="no chat template"):
        model = load(str(shared_data / "models" / "llama2c-stories260K"))
    seen = logit_lens(model, "Once upon a time, there was a little girl named Lily. She loved to")
    ranks = seen.next_rank[:, :-1].float().median(dim=1).values
    assert ranks[-1] < 5 < ranks[0]
    assert seen.entropy.max() <= math.log(model.unembed.out_features)
