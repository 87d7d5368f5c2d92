"""Prompts asked under several edits at once: as if each were asked alone, and the model is left as it was."""

import pytest
import torch

from helpers import tiny
from helpers.steered import random_edit
from helpers.worded import WordJudge
from replib.ablation.edited_generation import EditedAnswers, EditedGeneration, strongest_block
from replib.audit.judges import encode_outcomes
from replib.core.errors import ReplibError
from replib.data.prompts import Prompt
from replib.edits.apply import applied, applied_each
from replib.models.load import load

PROMPTS = [Prompt(text) for text in ("w1 w2 w3", "w4 w5", "w6 w7 w8 w9 w10", "w11 w12 w13")]
PLACE = ("resid_post", 1)
EDITS = [
    {},
    {"last_prompt": {PLACE: random_edit(1)}},
    {"response": {PLACE: random_edit(2)}},
    {"last_prompt": {PLACE: random_edit(3)}, "response": {("resid_post", 0): random_edit(4)}},
]


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def model(request, tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp(request.param), request.param))


def alone(model, edit):
    """The same answers from whole prompts, one after the other, without a cache of their beginning."""
    contexts = [applied(model, some, positions=where) for where, some in edit.items()]
    for context in contexts:
        context.__enter__()
    try:
        answers = [model.generate([p.text], max_new_tokens=6)[0] for p in PROMPTS]
    finally:
        for context in reversed(contexts):
            context.__exit__(None, None, None)
    return encode_outcomes(WordJudge()(PROMPTS, answers))


@pytest.mark.parametrize("rows", [4, 8, 64])
def test_edits_that_share_a_pass_do_what_each_does_alone(model, rows):
    found = EditedAnswers(model, PROMPTS, WordJudge(), max_new_tokens=6, rows=rows).outcomes(EDITS)
    assert found == [alone(model, edit) for edit in EDITS]
    assert len(set(found)) > 1


def test_an_edit_of_whole_prompts_reads_them_whole(model):
    edits = [{"all_prompt": {PLACE: random_edit(5)}}, {}, {"all": {PLACE: random_edit(6)}}]
    found = EditedAnswers(model, PROMPTS, WordJudge(), max_new_tokens=6).outcomes(edits)
    assert found == [alone(model, edit) for edit in edits]


def test_answers_that_are_begun_are_judged_with_their_beginning(model):
    openings, seen = ["w3", "", "w4 w5", "w3"], []

    class Noting(WordJudge):
        def __call__(self, prompts, answers):
            seen.extend(answers)
            return super().__call__(prompts, answers)

    EditedAnswers(model, PROMPTS, Noting(), max_new_tokens=6, openings=openings).outcomes(EDITS)
    expected = []
    for edit in EDITS:
        with applied_each(model, [edit]):
            expected += model.generate([p.text for p in PROMPTS], prefills=openings, max_new_tokens=6)
    assert seen == expected and len(set(expected)) > len(PROMPTS)


def test_logits_are_those_of_the_first_answer_token_and_one_edit_may_take_several_batches(model):
    texts = [p.text for p in PROMPTS]
    for size in (2, 4, 64):  # of rows
        scorer = EditedGeneration(model, texts, length=3, batch_size=size)
        for edits in EDITS[:2], [{"all": {PLACE: random_edit(5)}}]:
            for edit in edits:
                (logits, answers), asked = scorer.run([edit]), model.encode(texts)
                with torch.no_grad(), applied_each(model, [edit]):
                    torch.testing.assert_close(logits[0], model.forward(asked)[:, -1], atol=1e-4, rtol=1e-4)
                    assert answers == [model.generate(texts, max_new_tokens=3)]


def test_the_tokens_read_are_those_of_whole_prompts_or_their_last(model):
    texts = [p.text for p in PROMPTS]
    whole = sum(map(len, model.tokenize(texts)))
    scorer = EditedGeneration(model, texts, length=3, batch_size=8)
    assert [scorer.read(p) for p in ("last_prompt", "decode", "all")] == [4, 4, whole]
    assert EditedGeneration(model, texts, length=3, batch_size=2).read("last_prompt") == whole
    begun = EditedGeneration(model, texts, openings=["w1"] * 4, length=3, batch_size=8)
    assert begun.read("last_prompt") > whole


def test_the_model_is_what_it_was_also_after_a_fault(model):
    batch = model.encode([p.text for p in PROMPTS])
    with torch.no_grad():
        before = model.forward(batch)
        asked = EditedAnswers(model, PROMPTS, WordJudge(), max_new_tokens=4)
        asked.outcomes(EDITS)
        with pytest.raises(ReplibError, match="width 7"):
            asked.outcomes([{"last_prompt": {PLACE: random_edit(0, d=7)}}])
        assert torch.equal(model.forward(batch), before)


def test_the_strongest_complies_most_then_refuses_least_then_lies_in_the_middle():
    assert strongest_block(["rrrr", "rccr", "cccr", "ccdr"]) == 2
    assert strongest_block(["rrcd", "rcdd", "rrrc"]) == 1
    assert strongest_block(["rr"] * 5) == 2 and strongest_block(["rr", "rr", "cc", "rr", "cc"]) == 2
