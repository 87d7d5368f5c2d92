"""Tiny random chat models of real architectures, for the tests of what reads models."""

from pathlib import Path

import torch

import replib.models

WORDS = [f"w{i}" for i in range(40)]
TURN = "{% for m in messages %}<s> {{ m['content'] }} <end> {% endfor %}"
CHAT = TURN + "{% if add_generation_prompt %}<ask> {% endif %}"
COMMON = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
GROUPED = COMMON | {"num_key_value_heads": 2}
EXPERTS = GROUPED | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
GEMMA = GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8}
SIZES = {
    "llama": GROUPED,
    "mistral": GROUPED | {"head_dim": 8},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma2": GEMMA | {"final_logit_softcapping": 0.5},
    "gemma3_text": GEMMA,
    "phi3": GROUPED,
    "gpt_neox": COMMON,
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 3, "n_positions": 64},
    "olmo2": GROUPED,
    "falcon": COMMON,
    "mixtral": GROUPED | {"num_local_experts": 4},
    "qwen3_moe": EXPERTS,
    "cohere": GROUPED | {"logit_scale": 0.25},
    "granite": GROUPED | {"logits_scaling": 8.0},
}
RECURRENT = {
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": GROUPED
    | {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 4},
}
# A vision tower as deep as the text decoder and wider, so that neither depth nor size tells them apart.
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8}
SEEING = {
    "llava": {
        "text_config": {"model_type": "llama"} | GROUPED,
        "vision_config": TOWER | {"model_type": "clip_vision_model"},
    },
    "gemma3": {
        "text_config": {"model_type": "gemma3_text"} | GEMMA,
        "vision_config": {"model_type": "siglip_vision_model"} | TOWER,
    },
}


def tokenizer():
    """One word, one token; a chat template with tokens after the instruction."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<end>", "<ask>"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = CHAT
    return made


def save_model(folder: Path, kind: str = "llama", **sizes: int) -> Path:
    """A random three-block model of an architecture, with its tokenizer, as `from_pretrained` reads it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    words = tokenizer()
    own = {"vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.4}
    return _save(
        AutoModelForCausalLM, AutoConfig.for_model(kind, **(own | (SIZES | RECURRENT)[kind] | sizes)), words, folder
    )


def save_seeing(folder: Path, kind: str) -> Path:
    """A random text decoder with a vision tower around it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    words = tokenizer()
    own = {"vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.4}
    parts = {name: part | (own if name == "text_config" else {"patch_size": 4}) for name, part in SEEING[kind].items()}
    config = AutoConfig.for_model(kind, **parts, image_token_index=5, image_token_id=5, mm_tokens_per_image=1)
    return _save(AutoModelForImageTextToText, config, words, folder)


def _save(auto, config, words, folder: Path) -> Path:
    torch.manual_seed(0)
    model = auto.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:  # a norm that does nothing would hide a norm forgotten
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_around(tokenizer: Path, kind: str, folder: Path) -> Path:
    """A random three-block model around a real tokenizer and its template."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = AutoConfig.for_model(
        kind, vocab_size=len(words), max_position_embeddings=512, tie_word_embeddings=True, **GROUPED
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path) -> Path:
    """A random LoRA adapter on every linear layer of a saved model."""
    from peft import LoraConfig, get_peft_model

    model = replib.models.load(str(base)).model
    torch.manual_seed(1)
    bent = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    bent.save_pretrained(folder)
    return folder
