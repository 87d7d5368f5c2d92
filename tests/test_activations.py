"""Capture and rendering against transformers' own read-outs, on seven architectures."""

import pytest
import tiny
import torch

from replib.activations import Activations, capture, hooked, span
from replib.errors import ReplibError
from replib.models import load

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w10 w11"]
RESPONSES = ["w20 w21", "w22", "w23 w24 w25", "w26"]


@pytest.fixture(scope="module", params=tiny.SIZES)
def model(request, tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


@torch.no_grad()
def single(model, prompt, response=""):
    """Raw block outputs of one unpadded prompt, by a route of its own: transformers' hidden states."""
    ids = model.tokenizer(f"<s> {prompt} <end> <ask> {response}".strip(), return_tensors="pt")["input_ids"]
    out = model.causal_lm(input_ids=ids, output_hidden_states=True)
    return torch.stack(out.hidden_states)[:, 0]  # the last one has been through the final norm


def test_resid_post_equals_hidden_states_of_single_unpadded_prompts(model):
    acts = capture(model, PROMPTS, batch_size=4)
    for i, prompt in enumerate(PROMPTS):
        expected = single(model, prompt)[1:, -1]
        torch.testing.assert_close(acts.values[:-1, i], expected[:-1], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(model.final_norm(acts[-1][i]), expected[-1], atol=2e-5, rtol=1e-4)


def test_resid_pre_of_a_block_is_resid_post_of_the_one_before(model):
    pre, post = (capture(model, PROMPTS, site=s, positions="prompt") for s in ("resid_pre", "resid_post"))
    torch.testing.assert_close(pre.values[1:], post.values[:-1])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_sublayer_outputs_add_up_to_the_stream(kind, tmp_path):
    model = load(tiny.save_model(tmp_path, kind))
    pre, attn, mlp, post = (
        capture(model, PROMPTS, site=s).values for s in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    )
    torch.testing.assert_close(pre + attn + mlp, post, atol=1e-5, rtol=1e-4)


def test_batch_size_and_order_do_not_matter(model):
    one, four = capture(model, PROMPTS, batch_size=1), capture(model, PROMPTS, batch_size=4)
    torch.testing.assert_close(one.values, four.values, atol=1e-5, rtol=1e-4)
    turned = capture(model, PROMPTS[::-1], batch_size=3).values.flip(1)
    torch.testing.assert_close(turned, four.values, atol=1e-5, rtol=1e-4)


def test_spans_are_means_over_their_tokens(llama):
    names = ["prompt", "post_instruction", "response", "all", -1, -2]
    acts = capture(llama, PROMPTS, responses=RESPONSES, positions=names, layers=[1])
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        h = single(llama, prompt, response)[2]
        n = len(prompt.split()) + 3
        expected = [h[:n].mean(0), h[n - 2 : n].mean(0), h[n:].mean(0), h.mean(0), h[n - 1], h[n - 2]]
        torch.testing.assert_close(acts[1][i], torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_masks_part_a_row_into_template_instruction_and_response(llama):
    batch = llama.encode(PROMPTS, RESPONSES)
    assert (batch.prompt_mask ^ batch.response_mask == batch.attention_mask.bool()).all()
    assert (batch.post_mask.sum(1) == 2).all()  # "<end> <ask>" follow the instruction in tiny's template
    assert batch.response_mask.sum(1).tolist() == [len(r.split()) for r in RESPONSES]
    assert llama.tokenizer.decode(batch.input_ids[1][batch.post_mask[1]]) == "<end> <ask>"


def test_reading_stops_after_the_last_wanted_block(llama):
    reached = []
    handle = llama.blocks[2].register_forward_hook(lambda *_: reached.append(2))
    capture(llama, PROMPTS, layers=[0, 1])
    handle.remove()
    assert not reached


def test_saving_keeps_every_bit_and_the_provenance(llama, tmp_path):
    acts = capture(llama, PROMPTS, positions=["last_prompt", -2])
    again = Activations.load(acts.save(tmp_path / "a.safetensors"))
    assert torch.equal(acts.values, again.values)
    assert (again.layers, again.positions, again.site) == (acts.layers, acts.positions, acts.site)
    assert again.provenance == acts.provenance
    assert again.provenance["n"] == "4"
    assert not list(tmp_path.glob("*.partial"))


def test_hooks_are_gone_after_an_exception_inside_the_forward_pass(llama):
    def explode(_):
        raise RuntimeError("boom")

    before = [len(b._forward_hooks) for b in llama.blocks]
    with pytest.raises(RuntimeError, match="boom"), hooked(llama, {("resid_post", 1): explode}):
        llama.forward(llama.encode(PROMPTS))
    assert [len(b._forward_hooks) for b in llama.blocks] == before
    assert llama.reading is None


def test_adapter_off_reads_the_base(tmp_path):
    folder = tiny.save_model(tmp_path / "base")
    bent = load(folder, adapter=tiny.save_adapter(tmp_path / "adapter", folder))
    base = capture(load(folder), PROMPTS)
    with bent.adapter_off():
        assert torch.equal(capture(bent, PROMPTS).values, base.values)
    assert not torch.allclose(capture(bent, PROMPTS).values, base.values)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"layers": [7]}, "Layer 7 is not in .* 0 to 2"),
        ({"positions": "middle"}, "Unknown position 'middle'"),
        ({"positions": 0}, "Unknown position 0"),
        ({"site": "resid"}, "Unknown site 'resid'"),
        ({"positions": "response"}, "'response' of a row is empty"),
        ({"positions": -9}, "Position -9 lies before the start"),
    ],
)
def test_bad_arguments_are_named(llama, options, reason):
    with pytest.raises(ReplibError, match=reason):
        capture(llama, PROMPTS, **options)


def test_an_empty_list_and_an_empty_prompt_are_refused(llama):
    with pytest.raises(ReplibError, match="No prompts were given"):
        capture(llama, [])
    with pytest.raises(ReplibError, match="A prompt is empty"):
        capture(llama, ["w1", "  "])


def test_a_prompt_beyond_the_context_is_refused_not_cut(tmp_path):
    model = load(tiny.save_model(tmp_path, "gpt2"))  # 64 positions
    with pytest.raises(ReplibError, match="Prompt 1 has 83 tokens, but .* at most 64"):
        capture(model, ["w1", " ".join(["w2"] * 80)])


def test_nan_activations_name_the_first_broken_layer(tmp_path):
    model = load(tiny.save_model(tmp_path))
    with torch.no_grad():
        next(model.blocks[1].parameters()).fill_(float("nan"))
    with pytest.raises(ReplibError, match="NaN or infinite from layer 1 on"):
        capture(model, PROMPTS)


def test_an_unwritable_folder_is_named(llama, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReplibError, match="Cannot write .*REPLIB_OUT"):
        capture(llama, PROMPTS).save(tmp_path / "file" / "a.safetensors")


def test_span_names_cover_the_masks(llama):
    batch = llama.encode(PROMPTS, RESPONSES)
    assert torch.equal(span(batch, "prompt") | span(batch, "response"), span(batch, "all"))
