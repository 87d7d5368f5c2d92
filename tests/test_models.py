"""Loading: what is found by structure, what generation does, and what every wrong folder is told."""

import shutil
import warnings

import pytest
import tiny
import torch
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from replib.errors import ReplibError
from replib.models import Anatomy, fingerprint, load, merged, self_check

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("kind", tiny.SIZES)
def test_the_parts_found_by_structure_rebuild_the_logits(kind, tmp_path):
    found = self_check(load(tiny.save_model(tmp_path, kind)), PROMPTS)
    assert found["padded"] < 1e-4
    if kind not in ("gemma2", "cohere", "granite"):  # these scale or cap their logits afterwards
        assert found["lens"] < 1e-4
    assert found["adapter_effect"] == 0.0


def test_generation_in_a_batch_equals_one_prompt_at_a_time_in_transformers(folder):
    model = load(folder)
    answers = model.generate(PROMPTS, max_new_tokens=6)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = model.tokenizer(f"<s> {prompt} <end> <ask>", return_tensors="pt")["input_ids"]
        out = model.causal_lm.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert answer == model.tokenizer.decode(out, skip_special_tokens=True)


def test_a_prefill_is_where_the_answer_begins(folder):
    model = load(folder)
    free, forced = (
        model.generate(["w1"], max_new_tokens=3),
        model.generate(["w1"], max_new_tokens=3, prefills=["w9 w8"]),
    )
    assert forced[0].startswith("w9 w8") and not free[0].startswith("w9 w8")


def test_training_mode_is_given_back(folder):
    model = load(folder)
    model.model.train()
    model.generate(["w1"], max_new_tokens=1)
    assert model.model.training


def test_the_fingerprint_sees_weights_and_not_the_adapter(folder, tmp_path):
    bent = load(folder, adapter=tiny.save_adapter(tmp_path, folder))
    assert fingerprint(bent.causal_lm) == fingerprint(load(folder).causal_lm)
    other = load(folder)
    with torch.no_grad():
        list(other.model.parameters())[-1].mul_(1.5)
    assert fingerprint(other.causal_lm) != fingerprint(load(folder).causal_lm)


def test_anatomy_can_be_named_by_hand(folder):
    named = load(folder, anatomy=Anatomy("model.layers", "model.norm", "lm_head"))
    assert named.blocks == list(named.model.model.layers)
    with pytest.raises(ReplibError, match="no part 'model.lairs'.*anatomy=Anatomy"):
        load(folder, anatomy=Anatomy("model.lairs", "model.norm", "lm_head"))


def test_a_misspelt_organism_variant_is_corrected():
    with pytest.raises(ReplibError, match="no model folder 'alignd'.*'aligned'"):
        load("alignd")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ReplibError, match="There is no model folder"):
        load(tmp_path / "nothing")


def test_a_folder_without_a_tokenizer(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "bare")
    for file in copy.glob("*token*"):
        file.unlink()
    with pytest.raises(ReplibError, match="holds no tokenizer.*save_pretrained"):
        load(copy)


def test_a_folder_without_weights(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "bare")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ReplibError, match="Cannot load weights.*safetensors"):
        load(copy)


def test_a_tokenizer_without_a_chat_template_is_said_and_can_be_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "plain")
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(copy)
    with pytest.warns(UserWarning, match="no chat template"):
        model = load(copy)
    assert model.render("w1") == "w1" and not model.encode(["w1"]).post_mask.any()
    with pytest.raises(ReplibError, match="no chat template"):
        load(copy, template="chat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(copy, template="plain")


def test_not_a_causal_language_model(tmp_path):
    T5EncoderModel(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=1, d_kv=16)).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ReplibError, match="'t5' model, not a causal language model"):
        load(tmp_path)


def test_an_adapter_of_another_base(folder, tmp_path):
    adapter = tiny.save_adapter(tmp_path / "adapter", folder)
    other = tiny.save_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ReplibError, match="does not fit this model"):
        load(other, adapter=adapter)
    with pytest.raises(ReplibError, match="no adapter_config.json"):
        load(folder, adapter=tmp_path)


def test_a_merged_adapter_gives_the_same_logits_and_has_no_base_any_more(folder, tmp_path):
    adapter = tiny.save_adapter(tmp_path / "adapter", folder)
    bent, base = load(folder, adapter=adapter), load(folder)
    batch = bent.encode(["w1 w2", "w3"])
    with torch.no_grad():
        expected = bent.forward(batch)
        one = merged(bent)
        torch.testing.assert_close(one.forward(batch), expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(base.forward(batch), expected, atol=1e-3)
    assert one.adapter == str(adapter)
    with pytest.raises(ReplibError, match="is merged into"):
        one.adapter_off()
    with pytest.raises(ReplibError, match="no adapter to merge"):
        merged(base)


def test_an_adapter_of_other_weights_of_the_same_shape_is_refused(folder, tmp_path):
    adapter = tiny.save_adapter(tmp_path / "adapter", folder)
    (adapter / "replib.json").write_text('{"fingerprint": "0123456789abcdef"}')
    with pytest.raises(ReplibError, match="trained on another model .*0123456789abcdef"):
        load(folder, adapter=adapter)


@pytest.mark.parametrize("name", ["hf-qwen2.5", "hf-mistral-v3", "hf-minueza-32m-ultrachat"])
def test_real_templates_mark_the_instruction_exactly(name, shared_data, folder):
    model = load(folder)
    model.tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name, padding_side="left")
    model.template = model.tokenizer.chat_template
    for text in ("How do I bake bread?", "Was ist das — naïve? 🙂", "a\n\nb"):
        row = model.tokenize([text])[0]
        ids, n, post = row.ids, row.prompt, row.instruction[1]
        bare = lambda s: "".join(s.split())  # decoders of some tokenizers add blanks  # noqa: E731
        before, after = (bare(model.tokenizer.decode(part)) for part in (ids[:post], ids[post:]))
        assert before.endswith(bare(text)) and bare(model.render(text)).endswith(after)
        assert ids.count(model.tokenizer.bos_token_id) <= 1 and n == len(ids)
