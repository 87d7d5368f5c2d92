"""Edits fitted at tokens of an answer: activations and edited tokens; least strengths and the share that holds."""

import numpy as np
import pytest
import torch

from helpers import tiny
from replib.ablation.robustness import (
    FLIP_STRENGTHS,
    ON_ANSWER,
    PROMPT,
    SPAN,
    holding,
    least_strengths,
    token_edits,
    token_name,
    token_states,
)
from replib.activations.capture import capture
from replib.core.errors import ReplibError
from replib.core.stats import wilson
from replib.data.prompts import Dialogue
from replib.models.load import load

ANSWER = "w1 w2 w3 w4 w5"
HARMFUL = [Dialogue(f"w{i} w{i + 1}", f"w{i % 7} {ANSWER}") for i in range(8)]
HARMLESS = [Dialogue(f"w{i} w{2 * i % 40} w3", f"w{i % 9} {ANSWER}") for i in range(10, 19)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


def test_states_are_those_of_the_named_tokens(model):
    found = token_states(model, HARMFUL, tokens=(1, 4))
    assert list(found) == [PROMPT, token_name(1), token_name(4), SPAN]
    texts = [d.prompt for d in HARMFUL], [d.response for d in HARMFUL]
    for name, position in {PROMPT: "last_prompt", token_name(1): 0, token_name(4): 3, SPAN: "response"}.items():
        expected = capture(model, texts[0], responses=texts[1], positions=position).values
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-5)


def test_answers_that_end_before_the_last_token_are_left_out(model):
    short = [*HARMFUL, Dialogue("w30 w31", "w1 w2")]
    both = (token_states(model, some, tokens=(1, 3)) for some in (short, HARMFUL))
    one, other = (found[token_name(1)] for found in both)
    torch.testing.assert_close(one, other)
    with pytest.raises(ReplibError, match="0 of 8 answers have 9 tokens"):
        token_states(model, HARMFUL, tokens=(9,))


def test_each_edit_carries_the_harmful_mean_of_its_place_to_the_harmless_one_and_acts_where_its_name_says(model):
    states = [token_states(model, some, tokens=(1, 4)) for some in (HARMFUL, HARMLESS)]
    edits = token_edits(*states, "actadd")
    assert all(len(blocks) == model.n_layers for blocks in edits.values()) and len(edits) == 2 + 2 * 3
    for name in (PROMPT, token_name(1), token_name(4), SPAN):
        x, y = (found[name][1].mean(0) for found in states)
        where = "last_prompt" if name == PROMPT else "response"
        torch.testing.assert_close(edits[name][1][where]["resid_post", 1](x), y, atol=1e-5, rtol=1e-4)
    assert edits[ON_ANSWER][2] == {"response": edits[PROMPT][2]["last_prompt"]}
    both = edits[f"{PROMPT} + {token_name(4)}"][0]
    assert both == edits[PROMPT][0] | edits[token_name(4)][0]


def test_each_prompt_has_the_first_strength_that_flips_it():
    strengths = 0.0, 0.2, 0.4, 0.5, 1.0
    bounds = (0.0, 9), (0.35, 9), (0.5, 0.6), (5.0, 9)  # complied with between the two; the third refuses again
    complied = np.array([[a <= s <= b for a, b in bounds] for s in strengths])
    assert least_strengths(complied, strengths).tolist() == [0.0, 0.4, 0.5, np.inf]


def test_the_share_that_holds_falls_with_strength_and_its_interval_holds_it():
    least = np.random.default_rng(0).choice([*FLIP_STRENGTHS[1:], np.inf], (5, 40))
    table = holding(least)
    assert table.value.is_monotonic_decreasing and table.value.iloc[0] == 1
    assert (table.low <= table.value).all() and (table.value <= table.high).all()
    assert table.value.iloc[-1] == np.isinf(least).mean() and (table.n == 200).all()
    assert tuple(holding(np.full((3, 20), np.inf)).iloc[-1][["low", "high"]]) == wilson(20, 20)
