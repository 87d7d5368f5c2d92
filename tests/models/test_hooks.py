"""The seven sites of fifteen architectures, against modules named by hand and forwards wrapped, without any hook."""

from contextlib import contextmanager

import pytest
import torch

from helpers import tiny
from helpers.tolerance import close
from replib.activations.capture import capture_sites
from replib.core.errors import ReplibError
from replib.edits.apply import applied
from replib.models.hooks import SITES, hooked
from replib.models.load import load
from replib.transport.affine import AffineEdit

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w10 w11"]
LLAMA = {
    "attn_in": "self_attn <",
    "attn_out": "self_attn >",
    "resid_mid": "post_attention_layernorm <",
    "mlp_in": "mlp <",
    "mlp_out": "mlp >",
}
GEMMA = LLAMA | {
    "attn_out": "post_attention_layernorm >",
    "resid_mid": "pre_feedforward_layernorm <",
    "mlp_out": "post_feedforward_layernorm >",
}
PARALLEL = {name: at for name, at in LLAMA.items() if name != "resid_mid"}
# Read off the source of each architecture; "<" the input of a part of the block, ">" its output.
NAMED = dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe", "granite"], LLAMA) | {
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "olmo2": GEMMA | {"resid_mid": "mlp <"},
    "gpt2": {"attn_in": "attn <", "attn_out": "attn >", "resid_mid": "ln_2 <", "mlp_in": "mlp <", "mlp_out": "mlp >"},
    "gpt_neox": {"attn_in": "attention <", "attn_out": "attention >", "mlp_in": "mlp <", "mlp_out": "mlp >"},
    "falcon": PARALLEL | {"attn_in": "self_attention <", "attn_out": "self_attention >"},
    "cohere": PARALLEL,
}


@contextmanager
def wrapped(block, places):
    """Note what goes into and comes out of named parts, by replacing their forward methods."""
    seen, replaced = {}, set()
    for site, place in places.items():
        name, side = place.split()
        part = block.get_submodule(name)
        before = part.forward

        def forward(*args, before=before, site=site, side=side, **kwargs):
            out = before(*args, **kwargs)
            taken = args[0] if args else kwargs["hidden_states"]
            given = out if isinstance(out, torch.Tensor) else out[0]
            seen[site] = (taken if side == "<" else given).clone()
            return out

        part.forward = forward
        replaced.add(part)
    try:
        yield seen
    finally:
        for part in replaced:
            del part.forward


@torch.no_grad()
def read_by_hand(model, kind, layer):
    """Last-token values of each site, one unpadded prompt at a time."""
    rows = []
    for prompt in PROMPTS:
        ids = model.tokenizer(f"<s> {prompt} <end> <ask>", return_tensors="pt")["input_ids"]
        with wrapped(model.blocks[layer], NAMED[kind]) as seen:
            out = model.causal_lm(input_ids=ids, output_hidden_states=True)
        states = {"resid_pre": out.hidden_states[layer], "resid_post": out.hidden_states[layer + 1]} | seen
        rows.append({site: value[0, -1] for site, value in states.items()})
    return {site: torch.stack([row[site] for row in rows]) for site in rows[0]}


@pytest.fixture(scope="module", params=tiny.SIZES)
def named_model(request, tmp_path_factory):
    return request.param, load(tiny.save_model(tmp_path_factory.mktemp(request.param), request.param))


def test_every_site_equals_what_the_named_modules_see(named_model):
    kind, model = named_model
    expected = read_by_hand(model, kind, layer=1)
    found = capture_sites(model, PROMPTS, tuple(expected), layers=[1])
    assert set(expected) == set(SITES) - ({"resid_mid"} if "resid_mid" not in NAMED[kind] else set())
    for site, values in expected.items():
        close(found[site][1], values)


def test_the_sublayers_add_up_to_the_stream(named_model):
    kind, model = named_model
    middle = ("resid_mid",) if "resid_mid" in NAMED[kind] else ()
    found = capture_sites(model, PROMPTS, ("resid_pre", "attn_out", "mlp_out", "resid_post", *middle))
    pre, attn, mlp, post = (found[s].values for s in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
    close(pre + attn + mlp, post)
    if middle:
        close(pre + attn, found["resid_mid"].values)


def test_a_site_that_a_parallel_block_does_not_have_is_said(tmp_path):
    model = load(tiny.save_model(tmp_path, "gpt_neox"))
    with pytest.raises(ReplibError, match="no site 'resid_mid': attention and MLP read the same stream side by side"):
        capture_sites(model, PROMPTS, ["resid_mid"])


@pytest.mark.parametrize("massive", [1.0, 1e4])
def test_sublayers_scaled_before_they_are_added_are_refused_not_misread(tmp_path, massive):
    """Also where one coordinate of the stream is so large that what is added to the others is nothing beside it."""
    model = load(tiny.save_model(tmp_path, "granite"))
    with torch.no_grad():
        model.causal_lm.get_input_embeddings().weight[:, 0] *= massive
    for block in model.blocks:
        block.residual_multiplier = 0.22
    model = model.rebind(model.model)
    with pytest.raises(ReplibError, match="no site 'attn_out': .*do not add up"):
        capture_sites(model, PROMPTS, ["attn_out"])
    assert capture_sites(model, PROMPTS, ["resid_mid"])["resid_mid"].values.isfinite().all()


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model_is_read_too(tmp_path, how):
    plain = load(tiny.save_model(tmp_path))
    expected = capture_sites(plain, PROMPTS, SITES)
    compiled = load(tmp_path)
    if how == "wrapped":
        compiled.model = torch.compile(compiled.model, backend="eager")
    else:
        compiled.model.compile(backend="eager")
    with torch.no_grad():
        compiled.forward(compiled.encode(PROMPTS))  # compiled code without hooks now exists
    found = capture_sites(compiled, PROMPTS, SITES)
    for site in SITES:
        torch.testing.assert_close(found[site].values, expected[site].values)


def test_hooks_that_replace_reach_the_next_block(tmp_path):
    model = load(tiny.save_model(tmp_path, "gpt2"))
    with hooked(model, {("resid_post", 0): torch.zeros_like}):
        assert not capture_sites(model, PROMPTS, ["resid_pre"], layers=[1])["resid_pre"].values.any()


def test_hook_points_are_found_at_load_and_no_hooked_pass_looks_for_them(tmp_path):
    model, fresh = load(tiny.save_model(tmp_path)), load(tmp_path)
    assert [set(points) for points in fresh.hook_points] == [set(SITES)] * fresh.n_layers
    capture_sites(model, PROMPTS, SITES)
    passes = []
    fresh.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    edit = {1: AffineEdit.shift(torch.ones(16))}
    with applied(model, edit), applied(fresh, edit):
        expected, found = (capture_sites(m, PROMPTS, ["attn_in"])["attn_in"].values for m in (model, fresh))
    assert torch.equal(found, expected) and passes == [1]


def test_a_model_without_weights_loads_with_the_points_that_its_architecture_shows(named_model):
    _, model = named_model
    with torch.device("meta"):
        empty = type(model.causal_lm)(model.causal_lm.config)
    for points, known in zip(model.rebind(empty.eval()).hook_points, model.hook_points, strict=True):
        assert {"resid_pre", "resid_post"} <= set(points)
        assert {site: at.after for site, at in points.items()}.items() <= {
            s: at.after for s, at in known.items()
        }.items()


def test_blocks_that_return_tuples_are_read_and_edited_alike(tmp_path, monkeypatch):
    """As all did before transformers 5, and as those written elsewhere still do."""
    model, old = load(tiny.save_model(tmp_path)), load(tmp_path)
    block = old.blocks[1]
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda *a, **k: (forward(*a, **k), "attention weights"))
    block.register_forward_hook(lambda _m, _a, out: out)  # so that a tuple passes through hooks of others too
    following = old.blocks[2].forward
    monkeypatch.setattr(old.blocks[2], "forward", lambda hidden, *a, **k: following(hidden[0], *a, **k))
    expected, found = (capture_sites(m, PROMPTS, ["resid_post"], layers=[1])["resid_post"] for m in (model, old))
    torch.testing.assert_close(found.values, expected.values)
    with applied(model, {1: AffineEdit.shift(torch.ones(16))}), applied(old, {1: AffineEdit.shift(torch.ones(16))}):
        edited = [capture_sites(m, PROMPTS, ["resid_post"], layers=[2])["resid_post"].values for m in (model, old)]
    torch.testing.assert_close(edited[0], edited[1])
