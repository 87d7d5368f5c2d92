"""Where refusal is decided: onsets, errors in blocks, and the logit lens."""

import numpy as np
import pytest
import torch

from helpers import tiny
from replib.ablation.localisation import lens_profile, localisation_error, localisation_error_table, onset, steepest
from replib.ablation.refusal_score import RefusalTokens, first_logits
from replib.activations.capture import capture
from replib.models.load import load


def test_the_onset_is_where_a_share_of_the_maximum_is_reached():
    curve = np.array([0.0, 0.1, 0.45, 0.6, 0.9, 0.3])
    assert onset(curve) == 2 and onset(curve, share=1.0) == 4 and onset(curve, least=0.95) is None
    assert onset(5 * curve) == onset(curve) and onset(np.zeros(4)) is None


def test_the_steepest_block_adds_most():
    assert steepest(np.array([0.1, 0.2, 0.7, 0.8])) == 2
    assert steepest(np.array([0.5, 0.4, 0.3])) == 0 and steepest(np.zeros(3)) is None
    curve = np.random.default_rng(0).normal(size=9)
    assert steepest(curve) == np.diff(curve, prepend=min(0, curve[0])).argmax()


def test_errors_count_blocks_to_the_nearest_planted_one():
    assert [localisation_error(block, (5, 6)) for block in (2, 5, 6, 9)] == [-3, 0, 0, 3] and np.isnan(
        localisation_error(None, (5, 6))
    )
    table = localisation_error_table({"a": {"one": 4, "two": None}, "b": {"one": 8}}, {"a": (5, 6), "b": (7, 8)})
    assert table.error.tolist()[::2] == [-1, 0] and table["last"].tolist() == [6, 6, 8] and len(table) == 3


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_last_block_of_the_lens_is_the_models_own_decision(kind, tmp_path):
    model = load(tiny.save_model(tmp_path, kind))
    prompts = [f"w{i} w{i + 3}" for i in range(12)], [f"w{i} w5 w{i + 1}" for i in range(12)]
    states = [capture(model, texts).values for texts in prompts]
    likely = torch.cat([first_logits(model, texts) for texts in prompts]).mean(0).topk(20).indices
    tokens = RefusalTokens(tuple(likely.tolist()), (), 1.0, 0.0, 12, 12)
    curve = lens_profile(model, *states, tokens)
    said = [(tokens.scores(first_logits(model, texts)) > 0).double().mean() for texts in prompts]
    assert curve.shape == (3,) and curve[-1] == pytest.approx(float(said[0] - said[1]))
    assert np.allclose(lens_profile(model, states[0], states[0], tokens), 0)
