"""Capture and rendering against transformers' own read-outs, on seven architectures."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import dispatch_model

from helpers import tiny
from helpers.tolerance import close
from replib.activations import reader
from replib.activations.capture import capture, capture_pair, stream
from replib.core.errors import ReplibError
from replib.models.hooks import hooked
from replib.models.load import load
from replib.models.tokens import SPANS

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
        close(acts.values[:-1, i], expected[:-1])
        close(model.final_norm(acts[-1][i]), expected[-1])


def test_resid_pre_of_a_block_is_resid_post_of_the_one_before(model):
    pre, post = (capture(model, PROMPTS, site=s, positions="prompt") for s in ("resid_pre", "resid_post"))
    torch.testing.assert_close(pre.values[1:], post.values[:-1])


def test_batch_size_and_order_do_not_matter(model):
    one, four = capture(model, PROMPTS, batch_size=1), capture(model, PROMPTS, batch_size=4)
    close(one.values, four.values)
    turned = capture(model, PROMPTS[::-1], batch_size=3).values.flip(1)
    close(turned, four.values)


def test_spans_are_means_over_their_tokens(llama):
    names = ["prompt", "post_instruction", "response", "all", -1, -2]
    acts = capture(llama, PROMPTS, responses=RESPONSES, positions=names, layers=[1])
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        h = single(llama, prompt, response)[2]
        n = len(prompt.split()) + 3
        expected = [h[:n].mean(0), h[n - 2 : n].mean(0), h[n:].mean(0), h.mean(0), h[n - 1], h[n - 2]]
        close(acts[1][i], torch.stack(expected))


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
        ({"positions": 0}, "Position 0 lies beyond the response of 4 of 4 prompts"),
        ({"positions": []}, "No position was given"),
        ({"positions": "prompt", "pool": "max"}, "Unknown pooling 'max'"),
        ({"positions": "last_prompt", "pool": "none"}, "pool='none' takes one span"),
        ({"labels": ["a"]}, "4 prompts, but 1 labels"),
        ({"responses": RESPONSES[:1]}, "4 prompts and 1 responses"),
        ({"site": "resid"}, "Unknown site 'resid'"),
        ({"short": "drop"}, "short='drop': say 'refuse' or 'leave_out'"),
        ({"positions": "response"}, "'response' of a row is empty"),
        ({"positions": -9}, "Position -9 lies before the start"),
    ],
)
def test_badarguments_are_named(llama, options, reason):
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


def test_float16_that_overflows_is_said(tmp_path):
    model = load(tiny.save_model(tmp_path), dtype="float16")
    with torch.no_grad():
        for weights in model.blocks[1].mlp.parameters():
            weights.fill_(6e4)
    with pytest.raises(ReplibError, match="infinite from layer 1 on .*float16 overflows"):
        capture(model, PROMPTS)


def test_span_names_cover_the_masks(llama):
    batch = llama.encode(PROMPTS, RESPONSES)
    masks = {name: span.mask(batch) for name, span in SPANS.items()}
    assert torch.equal(masks["prompt"] | masks["response"], masks["all"])


# --------------------------------------------------------------------------------------------- responses
def test_integers_from_zero_on_are_tokens_of_the_response(model):
    forced = ["w20 w21", "w22 w23", "w23 w24 w25", "w26 w20"]
    acts = capture(model, PROMPTS, responses=forced, positions=[0, 1, -1], layers=[1])
    for i, (prompt, response) in enumerate(zip(PROMPTS, forced, strict=True)):
        n = len(prompt.split()) + 3
        expected = single(model, prompt, response)[2][[n, n + 1, n - 1]]
        close(acts[1][i], expected)


def written_by_hand(model, steps):
    """What decode steps see, with hooks on transformers' own generation, one prompt at a time."""
    rows = []
    for prompt in PROMPTS:
        ids = model.tokenizer(f"<s> {prompt} <end> <ask>", return_tensors="pt")["input_ids"]
        seen = []
        handle = model.blocks[1].register_forward_hook(
            lambda _m, _a, out, seen=seen: seen.append((out if isinstance(out, torch.Tensor) else out[0])[0, -1])
        )
        model.causal_lm.generate(ids, max_new_tokens=steps + 1, min_new_tokens=steps + 1, do_sample=False)
        handle.remove()
        rows.append(torch.stack(seen[1 : steps + 1]))  # the first call reads the prompt
    return torch.stack(rows)


def test_positions_of_a_written_answer_are_what_decode_steps_compute(model):
    model.causal_lm.generation_config.eos_token_id = None  # no answer ends early
    acts = capture(model, PROMPTS, max_new_tokens=4, positions=[0, 1, 3], layers=[1])
    close(acts[1], written_by_hand(model, 4)[:, [0, 1, 3]])
    before = capture(model, PROMPTS, positions="last_prompt", layers=[1])
    again = capture(model, PROMPTS, max_new_tokens=4, positions="last_prompt", layers=[1])
    close(again[1], before[1])  # the prompt's last token, not a decoded one


def test_an_answer_that_ends_before_the_wanted_token_is_said(llama, monkeypatch):
    first = llama.written(llama.encode(PROMPTS), 1).input_ids[0, -1].item()
    monkeypatch.setattr(llama.causal_lm.generation_config, "eos_token_id", first)
    with pytest.raises(ReplibError, match="Position 2 lies beyond the response of [1-4] of 4 prompts"):
        capture(llama, PROMPTS, max_new_tokens=4, positions=2)


@pytest.mark.parametrize("positions", [2, [0, "last_prompt", 2], "response"])
def test_prompts_without_a_wanted_token_are_left_out_where_that_is_asked(llama, monkeypatch, positions):
    prompts = [f"w{i} w{i + 1} w{i + 2}" for i in range(20)]
    monkeypatch.setattr(llama.causal_lm.generation_config, "eos_token_id", None)
    new = llama.written(llama.encode(prompts), 4).input_ids[:, -4:]
    end, needed = (4, 1) if positions == "response" else (9, 3)  # a response has a token at least
    long = [i for i, row in enumerate(new.tolist()) if end not in row[:needed]]
    assert 2 < len(long) < 18
    monkeypatch.setattr(llama.causal_lm.generation_config, "eos_token_id", end)
    options = {"max_new_tokens": 4, "positions": positions}
    acts = capture(llama, prompts, short="leave_out", batch_size=3, **options)
    assert acts.prompt.tolist() == long
    alone = capture(llama, [prompts[i] for i in long], **options)
    close(acts.values, alone.values)


def test_single_tokens_of_a_span(model):
    acts = capture(model, PROMPTS, responses=RESPONSES, positions="response", pool="none", layers=[0])
    assert acts.prompt.tolist() == [0, 0, 1, 2, 2, 2, 3]
    expected = torch.cat(
        [single(model, p, r)[1][len(p.split()) + 3 :] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    )
    close(acts[0], expected)
    means = capture(model, PROMPTS, responses=RESPONSES, positions="response", layers=[0])[0]
    close(torch.stack([acts.of([i])[0].mean(0) for i in range(4)]), means)


def test_results_are_picked_by_position_and_label(llama):
    acts = capture(llama, PROMPTS, positions=["last_prompt", -2], labels=["a", "b", "a", "a"])
    assert torch.equal(acts.at(-2).where("b").values, acts.values[:, 1:2, 1])
    assert acts.where("a").labels == ("a", "a", "a")
    with pytest.raises(ReplibError, match="Position -3 is not one of several"):
        acts.at(-3)
    with pytest.raises(ReplibError, match="No prompt is labelled 'c'"):
        acts.where("c")
    with pytest.raises(ReplibError, match="Layer 9 was not captured"):
        acts[9]


# --------------------------------------------------------------------------------------------- base and bent
@pytest.fixture(scope="module")
def bent(tmp_path_factory):
    folder = tiny.save_model(tmp_path_factory.mktemp("base"))
    return load(folder, adapter=tiny.save_adapter(tmp_path_factory.mktemp("adapter"), folder))


def test_a_pair_is_what_two_captures_give(bent):
    on, off = capture_pair(bent, PROMPTS, positions=["prompt", -1], batch_size=3)
    assert torch.equal(on.values, capture(bent, PROMPTS, positions=["prompt", -1], batch_size=3).values)
    with bent.adapter_off():
        alone = capture(bent, PROMPTS, positions=["prompt", -1], batch_size=3)
    assert torch.equal(off.values, alone.values) and off.provenance == alone.provenance
    assert on.provenance["adapter"] and not off.provenance["adapter"]


@torch.no_grad()
def test_a_pair_reads_the_answer_of_the_bent_model_twice(bent, monkeypatch):
    monkeypatch.setattr(bent.causal_lm.generation_config, "eos_token_id", None)
    on, off = capture_pair(bent, PROMPTS, max_new_tokens=3, positions="response", layers=[0])
    batch = bent.written(bent.encode(PROMPTS), 3)
    for found, state in ((on, nullcontext), (off, bent.adapter_off)):
        for i, real in enumerate(batch.attention_mask.bool()):
            with state():
                out = bent.causal_lm(input_ids=batch.input_ids[i : i + 1, real], output_hidden_states=True)
            close(found[0][i], out.hidden_states[1][0, -3:].mean(0))


def test_without_an_adapter_there_is_no_pair(llama):
    with pytest.raises(ReplibError, match="carries no adapter"):
        capture_pair(llama, PROMPTS)


# --------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("window", [1, 3, 100])
def test_streamed_pieces_joined_are_the_capture(llama, window):
    pieces = list(stream(llama, iter(PROMPTS), window=window, responses=iter(RESPONSES), positions="response"))
    expected = capture(llama, PROMPTS, responses=RESPONSES, positions="response").values
    close(torch.cat(pieces, dim=1), expected)
    assert len(pieces) == -(-len(PROMPTS) // window)


def small_memory(monkeypatch, model, most, error=torch.OutOfMemoryError):
    """A device that can read ``most`` padded tokens at a time."""
    sizes, forward = [], model.forward

    def refusing(batch, inputs=None):
        sizes.append(tuple(batch.input_ids.shape))
        if batch.input_ids.numel() > most:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(batch, inputs)

    monkeypatch.setattr(model, "forward", refusing)
    return sizes


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_where_memory_runs_out_batches_are_halved_and_nothing_is_lost(llama, monkeypatch, error):
    prompts = PROMPTS * 8
    expected = capture(llama, prompts)
    sizes = small_memory(monkeypatch, llama, most=40, error=error)
    found = capture(llama, prompts, batch_size=32)
    close(found.values, expected.values)
    refused = [s for s in sizes if s[0] * s[1] > 40]
    assert len(refused) == 3  # 32 rows of 8 tokens, then 16, then 8; 4 fit, and so does all that is as large
    assert max(rows for rows, width in sizes if width == 4) > 4  # shorter prompts go on in larger batches


def test_a_prompt_that_alone_is_too_large_is_said(llama, monkeypatch):
    small_memory(monkeypatch, llama, most=7)
    before = [len(b._forward_hooks) for b in llama.blocks]
    with pytest.raises(ReplibError, match="A single prompt of 8 tokens does not fit"):
        capture(llama, PROMPTS)
    assert [len(b._forward_hooks) for b in llama.blocks] == before


def test_other_errors_of_the_forward_pass_are_not_mistaken_for_memory(llama, monkeypatch):
    monkeypatch.setattr(llama, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        capture(llama, PROMPTS)
    assert not reader.out_of_memory(RuntimeError("shapes do not match"))


# --------------------------------------------------------------------------------------------- states of a model
def test_a_model_in_train_mode_with_dropout_and_checkpointing_is_read_as_in_eval_mode(tmp_path):
    model = load(tiny.save_model(tmp_path, "gpt2"))  # dropout 0.1
    expected = capture(model, PROMPTS).values
    model.model.gradient_checkpointing_enable()
    model.model.train()
    assert torch.equal(capture(model, PROMPTS).values, expected)
    assert model.model.training


def test_a_capture_inside_a_capture_disturbs_neither(llama):
    expected, inner = capture(llama, PROMPTS), []

    def again(_):
        if not inner:
            inner.append(None)
            inner[0] = capture(llama, PROMPTS[::-1], layers=[2, 0])

    with hooked(llama, {("resid_post", 0): again}):
        outer = capture(llama, PROMPTS)
    assert torch.equal(outer.values, expected.values)
    close(inner[0].values.flip(1), expected.values[[2, 0]])


def test_a_model_spread_over_memory_and_disk_is_read_the_same(tmp_path):
    expected = capture(load(tiny.save_model(tmp_path / "model")), PROMPTS, site="attn_out").values
    spread = load(tmp_path / "model")
    places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch_model(spread.model, places, offload_dir=tmp_path / "disk", main_device="cpu", force_hooks=True)
    assert next(spread.blocks[1].parameters()).is_meta
    torch.testing.assert_close(capture(spread, PROMPTS, site="attn_out").values, expected)
