"""Loading: what is found by structure, what generation does, and what every wrong folder is told."""

import shutil
import warnings
from importlib import import_module

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, T5Config, T5EncoderModel

from helpers import tiny
from helpers.tolerance import close
from replib.core.errors import ReplibError
from replib.models.adapters import merged
from replib.models.architecture import Architecture, find_architecture, fingerprint
from replib.models.load import load
from replib.models.self_check import self_check

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("kind", tiny.SIZES)
def test_the_parts_found_by_structure_rebuild_the_logits(kind, tmp_path):
    found = self_check(load(tiny.save_model(tmp_path, kind)), PROMPTS)
    assert found["padded"] < 1e-4 and found["lens"] < 1e-4
    assert found["adapter_effect"] == 0.0


@pytest.mark.parametrize("kind", tiny.SEEING)
def test_the_text_decoder_is_found_beside_a_vision_tower_of_the_same_depth(kind, tmp_path):
    model = load(tiny.save_seeing(tmp_path, kind))
    assert model.blocks == list(model.causal_lm.model.language_model.layers)
    assert (model.d_model, model.n_layers) == (16, 3)
    found = self_check(model, PROMPTS)
    assert found["padded"] < 1e-4 and found["lens"] < 1e-4
    ids = model.encode(["w1 w2"]).input_ids
    out = model.causal_lm.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert model.generate(["w1 w2"], max_new_tokens=4) == [model.tokenizer.decode(out, skip_special_tokens=True)]


class Odd(torch.nn.Module):
    """A decoder with lists as long as its blocks beside them and inside them, and a head by another name."""

    def __init__(self, norm=torch.nn.LayerNorm):
        super().__init__()
        wide = lambda n: torch.nn.ModuleList(torch.nn.Linear(n, n) for _ in range(3))  # noqa: E731
        self.config = LlamaConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2)
        self.eyes = wide(64)
        self.trunk = torch.nn.ModuleDict({"words": torch.nn.Embedding(9, 8), "gates": wide(2), "last": norm(8)})
        self.trunk["stack"] = torch.nn.ModuleList(torch.nn.Sequential(wide(8), *wide(8)) for _ in range(3))
        self.trunk["narrow"], self.trunk["after"] = torch.nn.LayerNorm(2), norm(8)
        self.readout = torch.nn.Linear(8, 9)

    def get_input_embeddings(self):
        return self.trunk["words"]

    def get_output_embeddings(self):
        return self.readout


def test_the_blocks_are_found_among_lists_of_equal_length():
    assert find_architecture(Odd()) == Architecture("trunk.stack", "trunk.after", "readout")
    with pytest.raises(ReplibError, match=r"final norm of Odd.*architecture=Architecture\(blocks='model.layers'"):
        find_architecture(Odd(norm=torch.nn.Identity))
    deeper = Odd()
    deeper.config.num_hidden_layers = 5
    with pytest.raises(ReplibError, match="Cannot find the 5 decoder blocks of Odd"):
        find_architecture(deeper)


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


def test_weights_left_on_disk_are_read_and_hashed_like_the_others(folder):
    whole = load(folder)
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "disk"}
    split = load(folder, device=parts | {f"model.layers.{i}": "disk" if i else "cpu" for i in range(3)})
    assert any(p.is_meta for p in split.model.parameters()) and split.device.type == "cpu"
    assert split.dtype == torch.float32
    assert fingerprint(split.causal_lm) == fingerprint(whole.causal_lm)
    assert split.generate(PROMPTS, max_new_tokens=4) == whole.generate(PROMPTS, max_new_tokens=4)
    assert self_check(split, PROMPTS)["lens"] < 1e-4


def test_weights_that_were_never_loaded_are_not_hashed(folder):
    config = load(folder).causal_lm.config
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ReplibError, match="model.embed_tokens.weight were never loaded"):
        fingerprint(empty)


def test_the_fingerprint_reads_whole_numbers(folder):
    model = load(folder).causal_lm
    before, names = fingerprint(model), [name for name, _ in model.named_parameters()]
    middle = model.get_submodule(names[len(names) // 2].rpartition(".")[0])
    hashes = {before}
    for scale in (90, 100):
        whole = (middle.weight * scale).to(torch.int8)
        middle.weight = torch.nn.Parameter(whole, requires_grad=False)
        hashes.add(fingerprint(model))
    assert len(hashes) == 3


def test_provenance_tells_two_adapters_of_one_base_apart(folder, tmp_path):
    base = load(folder)
    assert base.provenance()["adapter_hash"] == ""
    bent = load(folder, adapter=tiny.save_adapter(tmp_path / "one", folder))
    again = load(folder, adapter=tmp_path / "one")
    found = bent.provenance()["adapter_hash"]
    assert len(found) == 16 and again.provenance()["adapter_hash"] == found
    last = [p for n, p in again.model.named_parameters() if "lora_" in n][-1]
    with torch.no_grad():
        last[-1, -1] += 1e-3
    assert again.provenance()["adapter_hash"] != found
    assert merged(bent).provenance()["adapter_hash"] == found


def test_an_adapter_may_come_from_the_hub(folder, tmp_path, monkeypatch):
    saved = tiny.save_adapter(tmp_path / "saved", folder)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(saved))
    model, local = (load(folder, adapter=a) for a in ("somebody/adapter", saved))
    assert asked == ["somebody/adapter"] and model.adapter == "somebody/adapter"
    assert torch.equal(*(m.forward(m.encode(PROMPTS)) for m in (model, local)))


def test_an_adapter_that_the_hub_does_not_give_is_named(folder, monkeypatch):
    def refuse(name, **_):
        raise OSError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ReplibError, match="'somebody/adapter' is not a local folder, and the hub .*no network Check"):
        load(folder, adapter="somebody/adapter")


def test_quantising_without_the_package_says_what_is_missing(folder, monkeypatch):
    monkeypatch.setattr(import_module("replib.models.load"), "find_spec", lambda name: None)
    with pytest.raises(ReplibError, match="'4bit' needs the package bitsandbytes: pip install"):
        load(folder, quantize="4bit")
    with pytest.raises(ReplibError, match="'2bit': say '4bit' or '8bit'"):
        load(folder, quantize="2bit")


@pytest.mark.parametrize("form", ["4bit", "8bit"])
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_answers_is_hashed_and_reads_the_same_twice(form, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = tiny.save_model(tmp_path, hidden_size=64, intermediate_size=128)
    model = load(folder, quantize=form, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and len(fingerprint(model.causal_lm)) == 16
    assert len(model.generate(PROMPTS, max_new_tokens=3)) == 3
    with torch.no_grad():
        assert torch.equal(*(model.forward(model.encode(PROMPTS)) for _ in range(2)))


def test_what_a_model_brings_against_repetition_does_not_change_its_greedy_answer(folder):
    model = load(folder)
    answers = model.generate(PROMPTS, max_new_tokens=8)
    model.model.generation_config.update(repetition_penalty=9.0, no_repeat_ngram_size=1, num_beams=3)
    assert model.generate(PROMPTS, max_new_tokens=8) == answers


def test_architecture_can_be_named_by_hand(folder):
    named = load(folder, architecture=Architecture("model.layers", "model.norm", "lm_head"))
    assert named.blocks == list(named.model.model.layers)
    with pytest.raises(ReplibError, match="no part 'model.lairs'.*architecture=Architecture"):
        load(folder, architecture=Architecture("model.lairs", "model.norm", "lm_head"))


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
        close(one.forward(batch), expected)
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


def test_a_tokenizer_that_transformers_would_rebuild_as_another_kind_is_read_as_saved(tmp_path):
    model = load(tiny.save_model(tmp_path, "qwen2"))  # whole words, where Qwen's own tokenizer is of bytes
    assert not AutoTokenizer.from_pretrained(tmp_path)("w20 w21")["input_ids"]
    assert model.tokenizer.convert_ids_to_tokens(model.tokenizer("w20 w21")["input_ids"]) == ["w20", "w21"]
