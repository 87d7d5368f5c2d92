"""Prompts asked under several edits at once: as if each were asked alone, and the model is left as it was."""

import pytest
import tiny
import torch
from steered import random_edit
from worded import WordJudge

from replib.asked import Asked, strongest
from replib.edits import applied
from replib.errors import ReplibError
from replib.models import load
from replib.prompts import Prompt

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
    return "".join(o.value[0] for o in WordJudge()(PROMPTS, answers))


@pytest.mark.parametrize("rows", [4, 8, 64])
def test_edits_that_share_a_pass_do_what_each_does_alone(model, rows):
    found = Asked(model, PROMPTS, WordJudge(), max_new_tokens=6, rows=rows).letters(EDITS)
    assert found == [alone(model, edit) for edit in EDITS]
    assert len(set(found)) > 1


def test_an_edit_of_whole_prompts_reads_them_whole(model):
    edits = [{"all_prompt": {PLACE: random_edit(5)}}, {}, {"all": {PLACE: random_edit(6)}}]
    found = Asked(model, PROMPTS, WordJudge(), max_new_tokens=6).letters(edits)
    assert found == [alone(model, edit) for edit in edits]


def test_the_model_is_what_it_was_also_after_a_fault(model):
    batch = model.encode([p.text for p in PROMPTS])
    with torch.no_grad():
        before = model.forward(batch)
        asked = Asked(model, PROMPTS, WordJudge(), max_new_tokens=4)
        asked.letters(EDITS)
        with pytest.raises(ReplibError, match="width 7"):
            asked.letters([{"last_prompt": {PLACE: random_edit(0, d=7)}}])
        assert torch.equal(model.forward(batch), before)


def test_the_strongest_complies_most_then_refuses_least_then_lies_in_the_middle():
    assert strongest(["rrrr", "rccr", "cccr", "ccdr"]) == 2
    assert strongest(["rrcd", "rcdd", "rrrc"]) == 1
    assert strongest(["rr"] * 5) == 2 and strongest(["rr", "rr", "cc", "rr", "cc"]) == 2
