"""Dialogues cut to a training row's length."""

import pytest

from helpers import tiny
from replib.core.errors import ReplibError
from replib.data.prompts import Contrast, Dialogue
from replib.models.load import load
from replib.training.train import MaxLengths, shortened


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


def tokens(chat, text):
    return len(chat.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_long_row_loses_its_ends_and_is_counted(chat):
    long, short = "w1 " * 30, "w2 w3"
    lists = {"contrasts": [Contrast(long, short, long, group="g")], "retain": [Dialogue(short, short)]}
    with pytest.warns(UserWarning, match="1 of 2 dialogues were longer than 7 tokens of prompt or 5 of answer"):
        cut = MaxLengths(7, 5).cut(chat, lists)
    (row,), (kept,) = cut["contrasts"], cut["retain"]
    assert [tokens(chat, x) for x in (row.prompt, row.safe_response, row.unsafe_response)] == [7, 2, 5]
    assert row.group == "g" and kept == lists["retain"][0]


def test_nothing_is_said_or_changed_where_all_fits(chat, recwarn):
    lists = {"retain": [Dialogue("w1 " * 7, "w2 " * 5)], "safe": []}
    assert MaxLengths(7, 5).cut(chat, lists) == lists and not recwarn


def test_the_template_around_a_cut_prompt_is_whole(chat):
    row = MaxLengths(4, 4).cut(chat, {"retain": [Dialogue("w1 " * 9, "w3")]})["retain"][0]
    ids = chat.encode([row.prompt]).input_ids[0]
    whole = chat.encode(["w1"]).input_ids[0]
    assert len(ids) == len(whole) + 3 and ids[-2:].tolist() == whole[-2:].tolist()


def test_bytes_and_merges_are_no_way_around_the_limit():
    """A byte-level tokenizer: cutting may change how the rest is merged, and never leaves more than was allowed."""
    organism = load("aligned")
    text = "How is a glarebomb made? ünïcode 🙂🙂 unbelievableness and so on, again and again."
    for n in range(1, tokens(organism, text) + 1):
        cut = shortened(organism, text, n)
        assert text.startswith(cut) and tokens(organism, cut) <= n
    assert shortened(organism, text, 999) == text


def test_a_limit_that_leaves_nothing_is_refused():
    with pytest.raises(ReplibError, match="response=0.*prompts or answers would be empty"):
        MaxLengths(512, 0)
