"""Wrappers and prefills as text; suffixes and embeddings searched for on a tiny random model."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from replib.audit.attacks import ENGLISH_WRAPPERS, PREFILL, Attack, direct, prefill, wrapper_tasks
from replib.audit.gradient_attacks import GCGConfig, SoftPromptConfig, gcg, soft_prompt
from replib.core.errors import ReplibError
from replib.data.prompts import Prompt, load_prompts
from replib.models.chat_model import ChatModel

CHAT = "{{ bos_token }}[user] {{ messages[0]['content'] | trim }} [bot] "
PROMPTS = [Prompt("How {hot} is it?", "harmless", group="a", target="Sure, it is"), Prompt("Why?", group="b")]


@pytest.fixture(scope="module", params=[CHAT, None], ids=["template", "no template"])
def chat(request):
    """A random two-block Llama with a byte-level BPE of about 300 tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = [*ENGLISH_WRAPPERS.values(), "How hot is it? Sure, it is ! ! x x"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = request.param
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    return ChatModel(LlamaForCausalLM(config).eval(), tokenizer, name="tiny")


# -------------------------------------------------------------------------------------------------- text
def test_direct_changes_nothing():
    assert direct().apply(PROMPTS) == (PROMPTS, None)


def test_prefill_uses_the_target_and_falls_back_on_its_opening():
    assert prefill().apply(PROMPTS) == (PROMPTS, ["Sure, it is", PREFILL])
    assert prefill("Of course:").apply(PROMPTS)[1] == ["Sure, it is", "Of course:"]


def test_wrappers_keep_the_request_word_for_word_and_all_else_in_place():
    attacks = wrapper_tasks()
    assert len({a.name for a in attacks}) == len(attacks) >= 10
    for attack in attacks:
        asked, openings = attack.apply(PROMPTS)
        assert openings is None
        for before, after in zip(PROMPTS, asked, strict=True):
            assert before.text in after.text and before.text != after.text
            assert after.wrapper == attack.name
            assert (after.group, after.target, after.label) == (before.group, before.target, before.label)


def test_a_template_that_loses_the_request_is_refused():
    with pytest.raises(ReplibError, match="'odd' lacks {request}"):
        Attack("odd", template="Tell me a story.")


def test_attacks_run_on_real_prompts(shared_data):
    prompts = load_prompts("advbench", shared_data / "advbench/harmful_behaviors.csv", limit=30)
    for attack in (direct(), prefill(), *wrapper_tasks()):
        asked, openings = attack.apply(prompts)
        assert len(asked) == 30 and all(p.text in a.text for p, a in zip(prompts, asked, strict=True))
        assert openings is None or all(o.startswith("Sure") for o in openings)


# ---------------------------------------------------------------------------------------------- optimised
def state(chat):
    weights = {name: p.detach().clone() for name, p in chat.model.named_parameters()}
    flags = [(p.requires_grad, p.grad) for p in chat.model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in chat.model.modules()]
    return weights, flags, hooks


def assert_same(before, after):
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1:] == after[1:]


def target_loss(chat, prompt):
    """Cross-entropy of the target after a prompt, computed the long way round."""
    batch = chat.encode([prompt.text], [prompt.target])
    log_p = chat.forward(batch).log_softmax(-1)[0, :-1]
    taken = log_p.gather(1, batch.input_ids[0, 1:, None])[:, 0]
    return -taken[batch.response_mask[0, 1:]].mean().item()


def test_gcg_lowers_the_loss_and_its_text_gives_just_that_loss(chat):
    before = state(chat)
    prompt = PROMPTS[0]
    found = gcg(chat, prompt, config=GCGConfig(init="! ! ! ! ! !", steps=12, width=48, top_k=64, batch_size=20))
    assert_same(before, state(chat))
    assert min(found.losses) < found.losses[0] - 0.3
    # The theorem behind the re-tokenisation filter: the suffix, as text, has the loss of its tokens.
    (asked,), openings = found.attack.apply([prompt])
    assert openings is None and asked.text.startswith(prompt.text + " ") and asked.wrapper == "gcg"
    assert target_loss(chat, asked) == pytest.approx(min(found.losses), abs=1e-4)
    start = Attack("start", template="{request} ! ! ! ! ! !").apply([prompt])[0][0]
    assert target_loss(chat, start) == pytest.approx(found.losses[0], abs=1e-4)
    assert found.attack.template.isascii() and "</s>" not in found.attack.template


def test_gcg_is_the_same_for_the_same_seed(chat):
    config = GCGConfig(init="! ! !", steps=3, width=16, top_k=16)
    assert gcg(chat, PROMPTS[0], config=config) == gcg(chat, PROMPTS[0], config=config)


def test_soft_prompt_lowers_the_loss_and_leaves_the_model_alone(chat):
    before = state(chat)
    found = soft_prompt(chat, PROMPTS[0], config=SoftPromptConfig(tokens=6, steps=60, lr=2e-2, checkpoints=4))
    assert_same(before, state(chat))
    assert found.losses[-1] < 0.7 * found.losses[0] and len(found.losses) == 60
    assert found.vectors.shape == (4, 6, 32) and not found.vectors.requires_grad


def test_soft_prompt_makes_the_model_say_the_target(chat):
    prompt = Prompt("How hot is it?", target="Sure")
    found = soft_prompt(chat, prompt, config=SoftPromptConfig(tokens=20, steps=200, lr=5e-2, checkpoints=2))
    answers = found.generate(chat, max_new_tokens=12)
    assert len(answers) == 2 and answers[-1].startswith("Sure")
    assert not chat.generate([prompt.text])[0].startswith("Sure")


def test_zero_steps_away_the_soft_prompt_is_its_words(chat):
    """With a vanishing step, the soft prompt is the embeddings of ordinary text, so the losses agree."""
    config = SoftPromptConfig(init=" x x", tokens=2, steps=1, lr=0.0, checkpoints=1)
    n = len(chat.tokenizer(" x x", add_special_tokens=False)["input_ids"])
    found = soft_prompt(chat, PROMPTS[0], config=SoftPromptConfig(**(config.__dict__ | {"tokens": n})))
    asked = Attack("x", template="{request} x x").apply(PROMPTS[:1])[0][0]
    assert found.losses[0] == pytest.approx(target_loss(chat, asked), abs=1e-4)


def test_a_suffix_with_no_token_of_its_own_is_an_error(chat):
    with pytest.raises(ReplibError, match="no token lies within"):
        gcg(chat, PROMPTS[0], config=GCGConfig(init="", steps=1))
    with pytest.raises(ReplibError, match="must be at least 1"):
        SoftPromptConfig(steps=0)


@pytest.mark.parametrize("folder", ["hf-qwen2.5", "hf-mistral-v3", "hf-minueza-32m-ultrachat", "hf-gpt2"])
def test_suffixes_survive_real_tokenizers_and_templates(shared_data, folder):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.3,
    )  # fmt: skip
    chat = ChatModel(LlamaForCausalLM(config).eval(), tokenizer, name=folder)
    prompt = Prompt("How is bread made?", target="Sure, here is how")
    found = gcg(chat, prompt, config=GCGConfig(init="! ! !", steps=3, width=12, batch_size=4))
    assert len(found.losses) > 1 and min(found.losses) < found.losses[0]
    (asked,), _ = found.attack.apply([prompt])
    assert target_loss(chat, asked) == pytest.approx(min(found.losses), abs=1e-3)
