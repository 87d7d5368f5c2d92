"""Tracing with nnsight against capturing with hooks: same numbers, and a model left as it was."""

import logging
import sys

import pytest
import torch

from helpers import tiny
from helpers.tolerance import close
from replib.activations import remote
from replib.activations.capture import capture
from replib.activations.remote import outline, trace_capture
from replib.core.errors import ReplibError
from replib.models.hooks import SITES
from replib.models.load import load

PROMPTS = ["w1 w2 w3 w4", "w5", "w6 w7 w8 w9 w10 w11", "w12 w13"]
RESPONSES = ["w1 w2", "w3", "w4 w5 w6", "w7"]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2", "olmo2", "gpt_neox", "gpt2"])
def folder(request, tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(folder):
    return load(str(folder))


def same(traced, hooked):
    close(traced.values, hooked.values)
    assert (traced.layers, traced.positions, traced.site) == (hooked.layers, hooked.positions, hooked.site)
    for key in ("model", "prompts", "n", "fingerprint"):
        assert traced.provenance[key] == hooked.provenance[key]


@pytest.mark.parametrize("site", SITES)
def test_a_local_trace_equals_hooks_at_every_site(model, site):
    if model.causal_lm.config.model_type == "gpt_neox" and site == "resid_mid":
        pytest.skip("attention and MLP run side by side in GPT-NeoX: there is nothing between them")
    same(trace_capture(model, PROMPTS, site=site), capture(model, PROMPTS, site=site))


@pytest.mark.parametrize(
    "positions", [-2, "prompt", "post_instruction", "response", "all", ("last_prompt", "response")]
)
def test_a_local_trace_equals_hooks_at_every_position(model, positions):
    wanted = {"responses": RESPONSES, "positions": positions, "layers": [-1, 0]}
    same(trace_capture(model, PROMPTS, batch_size=3, **wanted), capture(model, PROMPTS, **wanted))


def test_single_tokens_and_written_answers_are_traced_as_they_are_hooked(model):
    wanted = {"responses": RESPONSES, "positions": "response", "pool": "none", "layers": [1]}
    traced = trace_capture(model, PROMPTS, **wanted)
    same(traced, capture(model, PROMPTS, **wanted))
    assert traced.prompt.tolist() == [0, 0, 1, 2, 2, 2, 3]
    written = {"max_new_tokens": 3, "positions": "all", "labels": ["a", "b", "b", "a"]}
    same(trace_capture(model, PROMPTS, **written), capture(model, PROMPTS, **written))
    with pytest.raises(ReplibError, match="Answers are not written remotely"):
        trace_capture(model, PROMPTS, remote="local", **written)


def test_rows_do_not_depend_on_the_batch_they_are_padded_in(model):
    whole = trace_capture(model, PROMPTS)
    singly = [trace_capture(model, [prompt]).values for prompt in PROMPTS]
    close(whole.values, torch.cat(singly, dim=1))


def test_the_request_ndif_would_get_gives_the_same_numbers_from_a_model_without_weights(folder, model):
    empty = outline(str(folder))
    assert all(parameter.is_meta for parameter in empty.model.parameters())
    wanted = {"positions": ("last_prompt", "all"), "layers": [0, 2]}
    packed = trace_capture(empty, PROMPTS, remote="local", **wanted)
    close(packed.values, capture(model, PROMPTS, **wanted).values)


def test_an_adapter_is_traced_on_and_off(folder, tmp_path):
    bent = load(str(folder), adapter=str(tiny.save_adapter(tmp_path, folder)))
    same(trace_capture(bent, PROMPTS), capture(bent, PROMPTS))
    with bent.adapter_off():
        base = trace_capture(bent, PROMPTS)
        same(base, capture(bent, PROMPTS))
    assert (base.values - trace_capture(bent, PROMPTS).values).abs().max() > 0.01
    with pytest.raises(ReplibError, match="adapter"):
        trace_capture(bent, PROMPTS, remote=True)


def state(model):
    names = {path: sorted(vars(module)) for path, module in model.model.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()]
    tokens = (model.tokenizer.padding_side, model.tokenizer.pad_token, len(model.tokenizer))
    return names, hooks, tokens, model.model.training, model.causal_lm.generation_config.to_dict()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_model_or_tokenizer_even_after_an_exception(folder, monkeypatch, fails):
    model = load(str(folder))
    model.tokenizer.padding_side, model.tokenizer.pad_token = "right", None
    model.model.train()
    before = state(model)
    monkeypatch.setattr(remote, "_read", (lambda *a, **k: 1 / 0) if fails else remote._read)
    if fails:
        with pytest.raises(ZeroDivisionError):
            trace_capture(model, PROMPTS)
    else:
        trace_capture(model, PROMPTS)
    assert state(model) == before


def test_the_key_is_asked_for_by_name_and_never_logged(model, monkeypatch, caplog, capfd):
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setattr(model, "name", "someone/model")
    with pytest.raises(ReplibError, match="NDIF_API_KEY"):
        trace_capture(model, PROMPTS, remote=True)

    import nnsight

    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    monkeypatch.setenv("NDIF_API_KEY", "the-secret-key")
    with caplog.at_level(logging.DEBUG):
        remote._check_remote(model, True)
    assert nnsight.CONFIG.API.APIKEY == "the-secret-key"
    assert "secret" not in caplog.text + "".join(capfd.readouterr())


def test_a_service_out_of_reach_is_reported_as_such(folder, monkeypatch):
    import nnsight

    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(nnsight.TransformersModel, "_remoteable_model_key", lambda self: "{}")
    monkeypatch.setattr(remote, "_check_remote", lambda model, where: None)
    with pytest.raises(ReplibError, match="NDIF did not run"):
        trace_capture(outline(str(folder)), PROMPTS, remote=True)


def test_a_folder_cannot_be_asked_of_ndif(model):
    with pytest.raises(ReplibError, match="folder"):
        trace_capture(model, PROMPTS, remote=True)


def test_without_nnsight_the_error_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "nnsight", None)
    with pytest.raises(ReplibError, match="pip install"):
        trace_capture(model, PROMPTS)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"layers": [7]}, "Layer 7"),
        ({"positions": "middle"}, "position"),
        ({"positions": "response"}, "empty"),
        ({"site": "resid_middle"}, "site"),
        ({"positions": -40}, "Position -40"),
    ],
)
def test_badarguments_are_refused_as_capture_refuses_them(model, wrong, reason):
    for read in (capture, trace_capture):
        with pytest.raises(ReplibError, match=reason):
            read(model, PROMPTS, **wrong)


def test_no_prompts_and_broken_weights_are_refused(folder):
    model = load(str(folder))
    with pytest.raises(ReplibError, match="No prompts"):
        trace_capture(model, [])
    torch.nn.init.constant_(next(model.blocks[1].parameters()), float("nan"))
    with pytest.raises(ReplibError, match="from layer 1 on"):
        trace_capture(model, PROMPTS)
