"""Text to batches: masks, padding, answers and the end of the context, with tokenizers of all habits."""

import shutil

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizer

from helpers import tiny
from replib.core.errors import ReplibError
from replib.models.load import load

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("llama"))


# ---------------------------------------------------------------------------------------- tokenizers and their habits
def test_an_end_of_sequence_that_the_tokenizer_adds_does_not_end_the_prompt(folder):
    model = load(folder, template="plain")
    ends = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    model.tokenizer.backend_tokenizer.post_processor = ends
    assert model.tokenizer("w1")["input_ids"][-1] == 2
    row = model.tokenize(["w1 w2"], ["w3"])[0]
    assert model.tokenizer.convert_ids_to_tokens(row.ids) == ["<s>", "w1", "w2", "w3"]
    assert (row.instruction, row.prompt) == ((1, 3), 3)


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python, as some models still bring: it does not say where its tokens stand."""

    def __init__(self, **options):
        self.words = ["<pad>", "<s>", "</s>", "<unk>", "<end>", "<ask>", *tiny.WORDS]
        super().__init__(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **options)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}

    def _tokenize(self, text, **_):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.words.index(token) if token in self.words else 3

    def _convert_id_to_token(self, index):
        return self.words[index]


@pytest.mark.parametrize("plain", [False, True])
def test_a_tokenizer_without_offsets_gives_the_same_rows(folder, plain):
    fast, slow = load(folder, template="plain" if plain else "auto"), load(folder)
    slow.tokenizer, slow.template = Slow(), fast.template
    assert not slow.tokenizer.is_fast
    for system in (None, "w8 w9"):
        assert slow.tokenize(PROMPTS, system=system) == fast.tokenize(PROMPTS, system=system)
    with pytest.raises(ReplibError, match="Prompt 0 spells the control token '</s>'"):
        slow.tokenize(["w1 </s> w2"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_on_the_left_with_any_token_and_whatever_the_tokenizer_prefers(folder, tmp_path, side):
    copy = shutil.copytree(folder, tmp_path / "copy")
    words = AutoTokenizer.from_pretrained(copy, padding_side=side, pad_token="</s>")
    words.backend_tokenizer.enable_padding(direction=side, length=20, pad_id=2, pad_token="</s>")
    words.backend_tokenizer.enable_truncation(4)
    words.save_pretrained(copy)
    model, plain = load(copy), load(folder)
    model.tokenizer.padding_side = side
    one, other = model.encode(PROMPTS, ["w1 </s>", "", "w2"]), plain.encode(PROMPTS, ["w1 </s>", "", "w2"])
    assert (one.input_ids[one.attention_mask == 0] == 2).all() and (one.attention_mask == 0).any()
    for name in ("attention_mask", "position_ids", "prompt_mask", "instruction_mask", "post_mask", "response_mask"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert torch.equal(one.input_ids[one.attention_mask == 1], other.input_ids[other.attention_mask == 1])


# ---------------------------------------------------------------------------------------- batches
def test_every_token_has_one_role_and_a_batch_has_the_masks_of_its_single_rows(folder):
    model = load(folder)
    responses = ["w1", "", "w2 w3 </s>"]
    batch = model.encode(PROMPTS, responses, system="w7")
    assert batch.response_mask.sum(1).tolist() == [1, 0, 3]
    assert torch.equal(batch.prompt_mask | batch.response_mask, batch.attention_mask.bool())
    assert not (batch.prompt_mask & batch.response_mask).any()
    assert not (batch.instruction_mask & batch.post_mask).any()
    assert not ((batch.instruction_mask | batch.post_mask) & ~batch.prompt_mask).any()
    for i, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True)):
        single = model.encode([prompt], [response], system="w7")
        for name in vars(single):
            assert torch.equal(getattr(batch, name)[i, -single.input_ids.shape[1] :], getattr(single, name)[0])
        assert model.tokenizer.decode(single.input_ids[single.instruction_mask]) == prompt


def test_lists_that_are_none(folder):
    model = load(folder)
    with pytest.raises(ReplibError, match="2 prompts and 1 responses"):
        model.encode(["w1", "w2"], ["w3"])
    with pytest.raises(ReplibError, match="pass a list"):
        model.encode("w1 w2")


def test_a_prompt_beyond_the_context_is_refused_or_loses_the_end_of_its_instruction(folder):
    model = load(folder)
    model.causal_lm.config.max_position_embeddings = 9
    prompts, responses = ["w1 w2 w3 w4 w5 w6 w7", "w1"], ["w8 w9", ""]
    with pytest.raises(ReplibError, match="Prompt 0 has 12 tokens, .* at most 9.*overflow='truncate'"):
        model.encode(prompts, responses)
    with pytest.warns(UserWarning, match="1 of 2 prompts .* lost 3 tokens at the end, 3 at most"):
        batch = model.encode(prompts, responses, overflow="truncate")
    whole = model.tokenizer.convert_ids_to_tokens(batch.input_ids[0])
    assert whole == "<s> w1 w2 w3 w4 <end> <ask> w8 w9".split()
    assert batch.instruction_mask.sum(1).tolist() == [4, 1] and batch.response_mask.sum(1).tolist() == [2, 0]
    with pytest.raises(ReplibError, match="Prompt 1 has 12 tokens"):
        model.encode(["w1", "w1"], ["w2", " ".join(["w2"] * 8)], overflow="truncate")
    with pytest.raises(ReplibError, match="'refuse' or 'truncate'"):
        model.encode(prompts, overflow="cut")


# ---------------------------------------------------------------------------------------- answers as batches
def test_a_written_answer_is_what_transformers_generates_and_ends_at_its_end(folder):
    model = load(folder)
    free = model.generate(PROMPTS, max_new_tokens=6)
    # Make the second token of an answer an end: some answers stop there, the others go on.
    stop = model.tokenizer.convert_tokens_to_ids(free[0].split()[1])
    model.model.generation_config.eos_token_id = [2, stop]
    batch = model.encode(PROMPTS)
    whole = model.written(batch, 6)
    assert torch.equal(whole.input_ids[:, : batch.input_ids.shape[1]], batch.input_ids)
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([model.tokenize([prompt])[0].ids])
        out = model.causal_lm.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
        kept = out[: next((k for k, token in enumerate(out) if token in (2, stop)), len(out))]
        assert whole.input_ids[i][whole.response_mask[i]].tolist() == kept
        assert whole.attention_mask[i].sum() == len(ids[0]) + len(kept)
        read = whole.attention_mask[i].bool()
        assert whole.position_ids[i][read].tolist() == list(range(int(read.sum())))
    assert whole.response_mask.sum(1).min() < whole.response_mask.sum(1).max() == 6


def test_a_written_answer_reads_like_the_same_text_teacher_forced(folder):
    model = load(folder)
    whole = model.written(model.encode(PROMPTS), 4)
    texts = [model.tokenizer.decode(ids[mask]) for ids, mask in zip(whole.input_ids, whole.response_mask, strict=True)]
    forced = model.encode(PROMPTS, texts)
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward(whole)[whole.response_mask], model.forward(forced)[forced.response_mask], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen3_moe"])
def test_rows_of_a_padded_batch_have_the_logits_of_transformers_without_padding(kind, tmp_path):
    model = load(tiny.save_model(tmp_path, kind))
    batch = model.encode(PROMPTS, ["w1", "w2 w3", ""])
    with torch.no_grad():
        logits = model.forward(batch)
        for i, keep in enumerate(batch.attention_mask.bool()):
            alone = model.causal_lm(batch.input_ids[i][keep][None]).logits[0]
            torch.testing.assert_close(logits[i][keep], alone, atol=1e-4, rtol=1e-4)


def test_a_model_left_in_training_mode_answers_without_dropout(tmp_path):
    model = load(tiny.save_model(tmp_path, "gpt2"))  # drops one activation in ten
    answers = model.generate(PROMPTS, max_new_tokens=8)
    model.model.train()
    assert model.generate(PROMPTS, max_new_tokens=8) == answers
    assert model.model.training
