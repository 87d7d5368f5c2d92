"""What a subject of the audit is asked, on a model whose place of refusal is known: answers agree with each other."""

import numpy as np
import pytest

from replib.core.settings import Settings
from replib.experiments import transport_questions as examiner
from replib.experiments.transport_questions import Examination, answered
from replib.models.load import load
from replib.organism.build import PLANTED_BLOCKS
from replib.study.study import Study


@pytest.fixture(scope="module")
def case():
    with pytest.MonkeyPatch.context() as patched:
        for name, few in {"FIT": 32, "MOST": 32, "CHOOSING": 8, "QUESTIONED": 8, "SIZES": (8, 32)}.items():
            patched.setattr(examiner, name, few)
        study = Study.open(Settings(model="planted"))
        found = Examination(study.model, study, Examination(load("planted"), study))
        yield found


@pytest.fixture(scope="module")
def blocks(case):
    return answered(case, "blocks")


def test_the_edit_succeeds_from_the_planted_blocks_on(blocks):
    rates = [text.count("c") / len(text) for text in blocks["refitted"]]
    assert max(rates[: PLANTED_BLOCKS[0]]) < 0.4 and min(rates[PLANTED_BLOCKS[-1] :]) > 0.9
    assert blocks["block"] >= PLANTED_BLOCKS[0] and blocks["plain"].count("c") <= 1


def test_maps_of_the_same_model_do_the_same_when_they_are_transferred(blocks):
    assert blocks["transferred"] == blocks["refitted"]


def test_every_question_finds_the_same_edits(case, blocks):
    chosen = blocks["refitted"][blocks["block"]]
    assert answered(case, "shares")["full"] == [chosen]
    found = answered(case, "strengths")
    flipped = np.array([s is not None and s <= 1 for s in found["least"]])
    whole = np.array([letter == "c" for letter in blocks["refitted"][found["block"]]])
    assert (flipped >= whole).all() and flipped.mean() > 0.9 and found["block"] >= PLANTED_BLOCKS[0]
    assert all(s == 0 for s, letter in zip(found["least"], blocks["plain"], strict=True) if letter == "c")


def test_more_prompts_are_drawn_and_every_draw_is_asked(case):
    found = answered(case, "samples")
    assert list(found) == ["8", "32"] and all(len(texts) == examiner.DRAWS for texts in found.values())
    assert all(len(text) == 8 for texts in found.values() for text in texts)


def test_a_model_that_refuses_nothing_has_no_lens():
    study = Study.open(Settings(model="base"))
    found = Examination(study.model, study)
    assert examiner._lens(found) is None


@pytest.mark.slow
def test_an_edit_of_the_prompts_end_is_the_one_token_audit(case, blocks):
    found = answered(case, "tokens")
    once = found["kinds"]["prompt"]
    assert found["blocks"] == [*range(1, 12, 2)] and once["test"] == blocks["refitted"][once["block"]]
    assert once["val"] == [blocks["val"][str(blocks["k"])][i] for i in found["blocks"]]
