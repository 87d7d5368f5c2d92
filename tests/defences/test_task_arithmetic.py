"""Task arithmetic against peft's own merge of each adapter into the weights."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from replib.core.errors import ReplibError
from replib.defences.task_arithmetic import task_arithmetic
from replib.models.chat_model import ChatModel

TARGETS = ["q_proj", "down_proj"]
KINDS = {
    "plain": {"r": 2, "lora_alpha": 8},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {"r": 2, "lora_alpha": 3, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"down_proj": 7}},
}


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=7, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapter(folder, seed=0, **options):
    """The folder of a random LoRA adapter of the tiny Llama."""
    model = get_peft_model(base(), LoraConfig(**{"target_modules": TARGETS} | options))
    torch.manual_seed(10 + seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapters(tmp_path):
    """Folders of one adapter of each kind."""
    return {kind: adapter(tmp_path / kind, seed, **KINDS[kind]) for seed, kind in enumerate(KINDS)}


def chat_around(model):
    """A ChatModel without a tokenizer."""
    chat = ChatModel.__new__(ChatModel)
    chat.model = model
    return chat


def merge(safe, unsafe, out, **weights):
    return task_arithmetic(chat_around(base()), safe, unsafe, out=out, **weights)


def delta(folder):
    """Change of each weight under the adapter, by peft's own merge."""
    before = base().state_dict()
    after = PeftModel.from_pretrained(base(), folder).merge_and_unload().state_dict()
    return {name: after[name] - before[name] for name in before}


@pytest.mark.parametrize(
    ("safe", "unsafe"), [("plain", "rslora"), ("rslora", "plain"), ("patterns", "plain"), ("rslora", "patterns")]
)
def test_task_arithmetic_adds_the_safe_delta_and_subtracts_the_unsafe_one(safe, unsafe, adapters, tmp_path):
    merged = merge(adapters[safe], adapters[unsafe], tmp_path / "merged", safe_weight=0.7, unsafe_weight=0.4)
    plus, minus, both = delta(adapters[safe]), delta(adapters[unsafe]), delta(merged)
    touched = [name for name in both if both[name].abs().max() > 0]
    assert len(touched) == 4
    for name in both:
        torch.testing.assert_close(both[name], 0.7 * plus[name] - 0.4 * minus[name], atol=1e-5, rtol=1e-4)


def test_an_adapter_minus_itself_changes_nothing(adapters, tmp_path):
    nothing = delta(merge(adapters["plain"], adapters["plain"], tmp_path / "nothing"))
    assert max(float(value.abs().max()) for value in nothing.values()) < 1e-5


def test_the_base_is_as_it_was_after_a_merge_and_after_a_refusal(adapters, tmp_path):
    model = base()
    chat, before = chat_around(model), {name: x.clone() for name, x in model.state_dict().items()}
    task_arithmetic(chat, adapters["plain"], adapters["rslora"], out=tmp_path / "merged")
    other = adapter(tmp_path / "other", r=2, target_modules=["k_proj"])
    with pytest.raises(ReplibError, match="same modules"):
        task_arithmetic(chat, adapters["plain"], other, out=tmp_path / "refused")
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_merge_refuses_what_it_would_merge_wrongly(adapters, tmp_path):
    safe, unsafe = adapters["plain"], adapters["rslora"]
    with pytest.raises(ReplibError, match="same modules"):
        merge(safe, adapter(tmp_path / "k", r=2, target_modules=["k_proj"]), tmp_path / "x")
    with pytest.raises(ReplibError, match="same modules"):
        merge(safe, adapter(tmp_path / "one", r=2, layers_to_transform=[1]), tmp_path / "x")
    for kind in ({"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(ReplibError, match="not a plain LoRA"):
            merge(adapter(tmp_path / next(iter(kind)), r=2, **kind), unsafe, tmp_path / "x")
    with pytest.raises(ReplibError, match="adapter_config.json"):
        merge(tmp_path / "absent", unsafe, tmp_path / "x")
    path = safe / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "z"}))
    with pytest.raises(ReplibError, match="different"):
        merge(safe, unsafe, tmp_path / "x")
    assert not (tmp_path / "x").exists()
