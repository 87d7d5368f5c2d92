"""Edits at work: where they act, whose they are, and that nothing of them is left, however the model is run."""

import pytest
import torch

from helpers import tiny
from helpers.steered import PROMPTS, next_input, random_edit
from helpers.tolerance import close
from replib.activations.capture import capture, capture_sites
from replib.core.errors import ReplibError
from replib.edits.apply import applied, bound
from replib.models.load import load
from replib.transport.affine import AffineEdit

ONE_EDIT = 16 + 3 + 2  # sums over the width and over the rank, the shift, and the state itself


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


class Counting(AffineEdit):
    """Changes nothing and notes how many tokens it was given."""

    seen: list[int] = []

    def __call__(self, x):
        self.seen.append(x.shape[:-1].numel())
        return x

    def __mul__(self, _):
        return self

    def to(self, _):
        return self


def test_each_group_of_rows_meets_its_own_edits(model):
    a, b = random_edit(1), random_edit(2)
    groups = [{0: a}, {}, {("mlp_out", 1): b, 0: b}]
    batch = model.encode(PROMPTS)
    with torch.no_grad(), applied(model, groups, positions="all"):
        together = model.forward(model.encode(PROMPTS * 3)).chunk(3)
    for edits, logits in zip(groups, together, strict=True):
        with torch.no_grad(), applied(model, edits, positions="all"):
            close(model.forward(batch), logits)
    with applied(model, groups), pytest.raises(ReplibError, match="4 rows do not split into 3 equal groups"):
        model.forward(model.encode(["w1 w2"] * 4))


def test_the_next_block_sees_the_edit(model):
    edit = random_edit()
    before = capture(model, PROMPTS, layers=[1])[1]
    with applied(model, {1: edit}):
        after = capture(model, PROMPTS, site="resid_pre", layers=[2])[2]
    close(after, edit(before))


def test_last_prompt_edits_that_token_alone(model):
    batch = model.encode(PROMPTS, ["w8 w9"] * 3)
    seen = {}
    handle = model.blocks[1].register_forward_pre_hook(
        lambda _m, a, k: seen.update(x=(a or (k["hidden_states"],))[0]), with_kwargs=True
    )
    model.forward(batch)
    before = seen["x"]
    for positions, mask in {
        "last_prompt": torch.zeros_like(batch.prompt_mask).scatter(1, batch.last_prompt[:, None], True),
        "all_prompt": batch.prompt_mask,
        "response": batch.response_mask,
        "decode": torch.zeros_like(batch.response_mask),  # answers that are given are not written
        "all": torch.ones_like(batch.prompt_mask),
    }.items():
        with applied(model, {0: AffineEdit.shift(torch.ones(16))}, positions=positions):
            model.forward(batch)
        torch.testing.assert_close(seen["x"] - before, mask[..., None].expand_as(before).float(), atol=1e-5, rtol=0)
    handle.remove()


def test_generated_tokens_are_edited_only_where_asked(model):
    """Decoding steps see one token at a time; 'last_prompt' must not match each of them."""
    counts, nothing = {}, Counting(torch.zeros(16, 0), torch.zeros(16, 0), torch.zeros(16))
    for positions in ("last_prompt", "all_prompt", "response", "decode", "all"):
        Counting.seen = []
        with applied(model, {1: nothing}, positions=positions):
            model.generate(["w1 w2", "w3 w4"], max_new_tokens=4)
        counts[positions] = Counting.seen
    assert counts["last_prompt"] == [2]
    assert counts["all_prompt"] == [2 * 5]
    assert set(counts["response"]) == {2} and len(counts["response"]) == 3
    assert counts["decode"] == counts["response"]
    assert counts["all"] == [2 * 5, 2, 2, 2]


def test_padding_and_batching_do_not_change_what_an_edit_does(model):
    with applied(model, {0: random_edit() * 0.1}, positions="last_prompt"):
        together = capture(model, PROMPTS, layers=[2], batch_size=3)
        alone = capture(model, PROMPTS, layers=[2], batch_size=1)
        words = (
            model.generate(PROMPTS, max_new_tokens=5),
            [model.generate([p], max_new_tokens=5)[0] for p in PROMPTS],
        )
    close(together.values, alone.values)
    assert words[0] == words[1]


@torch.no_grad()
def test_the_model_is_bit_for_bit_what_it_was(model):
    batch = model.encode(PROMPTS)
    before, weights = model.forward(batch), {k: v.clone() for k, v in model.model.state_dict().items()}
    with applied(model, {0: random_edit(), 2: random_edit(1)}, positions="all"):
        assert not torch.equal(model.forward(batch), before)
        with applied(model, {1: random_edit(2)}, positions="all_prompt"):
            model.forward(batch)
    assert torch.equal(model.forward(batch), before)
    with pytest.raises(KeyError), applied(model, {0: random_edit()}):
        raise KeyError
    assert torch.equal(model.forward(batch), before)
    assert all(torch.equal(v, weights[k]) for k, v in model.model.state_dict().items())


@torch.no_grad()
def test_strength_zero_changes_no_bit_and_half_goes_half_way(model):
    batch = model.encode(PROMPTS)
    before = model.forward(batch)
    with applied(model, {0: random_edit()}, strength=0.0, positions="all"):
        assert torch.equal(model.forward(batch), before)
    edit, x = random_edit(), capture(model, PROMPTS, layers=[1])[1]
    with applied(model, {1: edit}, strength=0.5):
        half = capture(model, PROMPTS, site="resid_pre", layers=[2])[2]
    close(half, x + 0.5 * edit.displacement(x))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "olmo2"])
def test_what_a_sublayer_adds_is_edited_where_it_is_added(kind, tmp_path):
    """After its last norm, if it has one: so the same vector arrives in the stream."""
    made, shift = load(tiny.save_model(tmp_path, kind)), torch.linspace(-1, 1, 16)
    before = capture_sites(made, PROMPTS, ("resid_mid", "resid_post"), layers=[1])
    with applied(made, {("attn_out", 1): AffineEdit.shift(shift)}):
        middle = capture(made, PROMPTS, site="resid_mid", layers=[1])[1]
    with applied(made, {("mlp_out", 1): AffineEdit.shift(shift)}):
        after = capture(made, PROMPTS, layers=[1])[1]
    close(middle, before["resid_mid"][1] + shift)
    close(after, before["resid_post"][1] + shift)


@pytest.mark.parametrize(
    ("edits", "options", "reason"),
    [
        ({9: random_edit()}, {}, "Layer 9 is not in"),
        ({0: random_edit(d=8)}, {}, "width 8, but .* has 16"),
        ({("nowhere", 0): random_edit()}, {}, "Unknown site 'nowhere'"),
        ({("resid_mid", 0): random_edit()}, {}, "resid_mid is only read: edit attn_out"),
        ({0: random_edit()}, {"positions": "last"}, "Unknown edit positions 'last'"),
        ({0: random_edit()}, {"strength": 1.5}, r"1.5 is outside \[0, 1\].*multiply the edit"),
    ],
)
def test_bad_edits_are_named(model, edits, options, reason):
    with pytest.raises(ReplibError, match=reason), applied(model, edits, **options):
        pass


def test_where_the_prompt_ends_must_be_known(model):
    with (
        pytest.raises(ReplibError, match="model.forward or model.generate"),
        applied(model, {0: random_edit()}),
    ):
        model.model(**model.encode(PROMPTS).inputs())


# --------------------------------------------------------------------------------------------- whose edit it is
def test_an_edit_is_refused_by_another_model_layer_or_site(model, tmp_path):
    edits = bound(model, {("resid_post", 1): random_edit()})
    edit = edits[("resid_post", 1)]
    with applied(model, edits), applied(model, {1: edit}), applied(model, {-2: edit}):
        pass
    for wrong in ({0: edit}, {("mlp_out", 1): edit}):
        with pytest.raises(ReplibError, match="resid_post of block 1 .* not for"), applied(model, wrong):
            pass
    other = load(tiny.save_model(tmp_path, "qwen2"))
    with pytest.raises(ReplibError, match="fit it again"), applied(other, edits):
        pass
    with applied(other, {0: edit.bound(None)}):
        pass


def test_an_adapter_makes_another_model(tmp_path):
    base = tiny.save_model(tmp_path / "base")
    bent = load(base, adapter=tiny.save_adapter(tmp_path / "adapter", base))
    edits = bound(bent, {("resid_post", 1): random_edit()})
    with applied(bent, edits):
        pass
    with bent.adapter_off(), pytest.raises(ReplibError, match="fitted for"), applied(bent, edits):
        pass
    with pytest.raises(ReplibError, match="fitted for"), applied(load(base), edits):
        pass


# --------------------------------------------------------------------------------------------- every way to run
def check_exact(model, depth):
    """The next block is given what the formula says, at the edited tokens alone, and nothing of it is left."""
    batch, edit = model.encode(PROMPTS, ["w8 w9"] * 3), random_edit()
    before = next_input(model, batch, 0)
    with applied(model, {0: edit}, positions="all_prompt"):
        after = next_input(model, batch, 0)
    expected = torch.where(batch.prompt_mask[..., None], edit(before), before)
    close(after, expected, depth=depth)
    assert torch.equal(after[~batch.prompt_mask], before[~batch.prompt_mask])
    assert torch.equal(next_input(model, batch, 0), before)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_neox", "mixtral"])
def test_edits_are_exact_in_every_architecture(kind, tmp_path):
    check_exact(load(tiny.save_model(tmp_path, kind)), ONE_EDIT)


def test_edits_are_exact_in_bfloat16(tmp_path):
    check_exact(load(tiny.save_model(tmp_path), dtype="bfloat16"), depth=2)  # computed in float32


def test_edits_are_exact_with_an_adapter_on_and_off(tmp_path):
    base = tiny.save_model(tmp_path / "base")
    bent = load(base, adapter=tiny.save_adapter(tmp_path / "adapter", base))
    check_exact(bent, ONE_EDIT)
    batch, plain, edits = bent.encode(PROMPTS), load(base), {0: random_edit()}
    with torch.no_grad(), bent.adapter_off(), applied(bent, edits), applied(plain, edits):
        torch.testing.assert_close(bent.forward(batch), plain.forward(batch))


def test_edits_are_exact_where_the_model_is_spread_over_memory_and_disk(tmp_path):
    from accelerate import dispatch_model

    expected = load(tiny.save_model(tmp_path / "model"))
    spread, edits = load(tmp_path / "model"), {0: random_edit(), ("attn_out", 1): random_edit(1)}
    places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch_model(spread.model, places, offload_dir=tmp_path / "disk", main_device="cpu", force_hooks=True)
    batch, answers = spread.encode(PROMPTS), []
    for model in (expected, spread):
        with torch.no_grad(), applied(model, bound(model, edits_at(edits)), positions="all"):
            answers.append((model.forward(batch), model.generate(PROMPTS, max_new_tokens=4)))
    torch.testing.assert_close(answers[0][0], answers[1][0])
    assert answers[0][1] == answers[1][1]


def edits_at(edits):
    return {(key if isinstance(key, tuple) else ("resid_post", key)): edit for key, edit in edits.items()}


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model_is_edited_too(tmp_path, how):
    plain, compiled = load(tiny.save_model(tmp_path)), load(tmp_path)
    if how == "wrapped":
        compiled.model = torch.compile(compiled.model, backend="eager")
    else:
        compiled.model.compile(backend="eager")
    batch = plain.encode(PROMPTS)
    with torch.no_grad():
        before = compiled.forward(batch)  # compiled code without hooks now exists
        with applied(plain, {0: random_edit()}), applied(compiled, {0: random_edit()}):
            torch.testing.assert_close(compiled.forward(batch), plain.forward(batch))
        assert torch.equal(compiled.forward(batch), before)


def decoded(model, batch, *, edit, steps):
    """Greedy answers without a cache: every step reads everything again, and what was answered is edited as such."""
    rows = batch
    for _ in range(steps):
        with torch.no_grad(), applied(model, {0: edit}, positions="all"):
            rows = rows.answered(model.forward(rows)[:, -1].argmax(-1, keepdim=True))
    return rows.input_ids[:, batch.input_ids.shape[1] :]


def test_generating_with_a_cache_is_generating_without_one(model):
    batch, edit = model.encode(PROMPTS), random_edit()
    with applied(model, {0: edit}, positions="all"):
        found = model.continued(batch, 5)[:, batch.input_ids.shape[1] :]
    kept = ~model.ends(found).cumsum(1).bool()
    assert torch.equal(found[kept], decoded(model, batch, edit=edit, steps=5)[kept]) and kept.any()


@pytest.mark.parametrize("positions", ["last_prompt", "all_prompt", "decode", "all"])
def test_beams_of_one_prompt_meet_the_same_edit(model, positions):
    """Beam search holds each row several times; a prompt in a batch is answered as by itself."""
    edit = random_edit()

    def beams(prompts):
        batch = model.encode(prompts)
        with model.reading_batch(batch), applied(model, {1: edit}, positions=positions):
            ids = model.model.generate(**batch.inputs(), num_beams=3, do_sample=False, max_new_tokens=4, pad_token_id=0)
        return model.tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)

    assert beams(PROMPTS) == [beams([p])[0] for p in PROMPTS]


def test_an_answer_to_a_prompt_of_one_token_is_not_taken_for_the_prompt(model):
    model.template, template = None, model.template
    Counting.seen, nothing = [], Counting(torch.zeros(16, 0), torch.zeros(16, 0), torch.zeros(16))
    try:
        with applied(model, {1: nothing}, positions="last_prompt"):
            model.generate(["w1", "w2"], max_new_tokens=4)
            model.generate(["w3", "w4"], max_new_tokens=4)
    finally:
        model.template = template
    assert Counting.seen == [2, 2]


def test_a_prompt_read_in_pieces_is_refused(model):
    batch = model.encode(PROMPTS)
    with model.reading_batch(batch), applied(model, {0: random_edit()}), pytest.raises(ReplibError, match="at once"):
        model.model(**batch.columns(0, 3).inputs())


def test_an_outer_edit_acts_before_an_inner_one(model):
    a, b, batch = random_edit(1), random_edit(2), model.encode(PROMPTS)
    with torch.no_grad(), applied(model, {0: b @ a}):
        expected = model.forward(batch)
    with torch.no_grad(), applied(model, {0: a}), applied(model, {0: b}):
        torch.testing.assert_close(model.forward(batch), expected, atol=1e-3, rtol=1e-3)


def test_an_edit_fitted_at_one_position_may_act_at_another(model):
    """Fit at the first instruction token; act on the last prompt token."""
    x = capture(model, PROMPTS, layers=[0], positions="instruction")[0]
    with applied(model, {0: AffineEdit.shift(x.mean(0))}, positions="last_prompt"):
        after = capture(model, PROMPTS, site="resid_pre", layers=[1])[1]
    close(after, capture(model, PROMPTS, layers=[0])[0] + x.mean(0))
