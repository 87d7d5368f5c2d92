"""Sweeping edits: fitted in sequence, scored together, gone on with, and leaving nothing behind."""

from dataclasses import replace

import pandas as pd
import pytest
import tiny
import torch

from replib.ablation import AblationData, Sweeper, best_of, fit_edits, sweep_layers
from replib.activations import capture
from replib.edits import applied
from replib.errors import ReplibError
from replib.judges import PhraseJudge
from replib.methods import METHODS
from replib.models import load
from replib.prompts import Prompt

HARMFUL = [f"w{i} w{i + 1} w{i + 2}" for i in range(0, 20)]
HARMLESS = [f"w{i} w{(2 * i) % 40}" for i in range(20, 38)]
DATA = AblationData(HARMFUL, HARMLESS, [Prompt("w39 w38", "harmful"), Prompt("w37 w36", "harmful")], ["w1 w39", "w2"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


def test_a_later_edit_is_fitted_with_the_earlier_one_active(model):
    both = fit_edits(model, "actadd", DATA, [2, 0])
    first = fit_edits(model, "actadd", DATA, [0])
    with applied(model, first, positions="all"):  # where its source acts
        moved = [capture(model, x, layers=[2])[2].mean(0) for x in (HARMLESS, HARMFUL)]
    torch.testing.assert_close(both[("resid_post", 2)].c, moved[0] - moved[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[("resid_post", 0)].c, first[("resid_post", 0)].c)


def test_a_method_that_is_not_sequential_is_fitted_on_the_unedited_model(model):
    at_once = fit_edits(model, replace(METHODS["actadd"], sequential=False), DATA, [0, 2])
    for layer in (0, 2):
        alone = fit_edits(model, "actadd", DATA, [layer])
        torch.testing.assert_close(at_once["resid_post", layer].c, alone["resid_post", layer].c)


def test_each_method_is_fitted_where_its_source_reads(model):
    """AcT on means over the prompt, and at any site; what is fitted belongs to this model and place."""
    edits = fit_edits(model, replace(METHODS["mean_act"], site="mlp_in"), DATA, [1])
    means = [capture(model, x, site="mlp_in", layers=[1], positions="prompt")[1].mean(0) for x in (HARMLESS, HARMFUL)]
    torch.testing.assert_close(edits["mlp_in", 1].c, means[0] - means[1], atol=1e-5, rtol=1e-4)
    with pytest.raises(ReplibError, match="mlp_in of block 1"), applied(model, {("mlp_in", 2): edits["mlp_in", 1]}):
        pass


@pytest.mark.parametrize("method", METHODS)
def test_a_sweep_has_a_row_a_block_and_leaves_the_model_as_it_was(model, method):
    batch = model.encode(HARMFUL[:3])
    with torch.no_grad():
        before = model.forward(batch)
        table = sweep_layers(model, DATA, PhraseJudge(), method, ks=(1, 2))
        assert torch.equal(model.forward(batch), before)
    assert len(table) == (6 if METHODS[method].ranked else 3)
    assert (table.n_harmful == 20).all() and (table.n_harmless == 18).all()
    assert (table.positions == METHODS[method].positions).all()
    assert (table.n == 2).all() and (table.low <= table.compliance).all() and (table.compliance <= table.high).all()
    assert (table.kl >= -1e-6).all() and table.kl.max() > 0


def test_a_sweep_goes_on_where_it_stopped(model, tmp_path, monkeypatch):
    store = tmp_path / "sweep.jsonl"
    Sweeper(model, DATA, PhraseJudge(), store=store).layers(ks=(1,), layers=[0, 1])
    again = Sweeper(model, DATA, PhraseJudge(), store=store)
    scored, score = [], again.score
    monkeypatch.setattr(again, "score", lambda cells, stages: scored.extend(cells) or score(cells, stages))
    assert len(again.layers(ks=(1,))) == 3 and [cell.layers for cell in scored] == [(2,)]


@pytest.mark.parametrize("method", ["pca_ot", "rfa", "linear_act"])
@pytest.mark.parametrize("positions", ["last_prompt", "all"])
def test_edits_that_share_a_pass_score_as_each_does_alone(model, method, positions):
    """Two rows a pass hold one edit at a time, eight rows four edits."""
    few, many = (
        Sweeper(model, DATA, PhraseJudge(), batch_size=size).layers(method, ks=(1, 2, 3), positions=positions)
        for size in (2, 8)
    )
    assert len(few.kl.unique()) == len(few) > 2
    pd.testing.assert_frame_equal(few, many, rtol=1e-4)


def test_the_best_of_equals_is_the_gentlest():
    table = pd.DataFrame({"model": ["a", "a", "a", "b"], "compliance": [0.9, 1, 1, 0], "kl": [0, 3, 2, 1]})
    assert best_of(table, "model").kl.tolist() == [2, 1]


def test_one_two_and_all_blocks(model):
    table = Sweeper(model, DATA, PhraseJudge()).depths(1, k=1)
    assert [tuple(x) for x in table.layers] == [(1,), (0, 1), (1, 2), (0, 1, 2)]


def test_both_classes_are_needed_and_fitted_prompts_are_not_scored():
    with pytest.raises(ReplibError, match="No harmless prompts"):
        AblationData(HARMFUL, [], DATA.scored, DATA.neutral)
    with pytest.raises(ReplibError, match="1 scored prompts were used to fit"):
        AblationData(HARMFUL, HARMLESS, [Prompt(HARMFUL[3])], DATA.neutral)


def test_a_block_that_does_not_exist(model):
    with pytest.raises(ReplibError, match="Layer 5 is not in"):
        sweep_layers(model, DATA, PhraseJudge(), layers=[5])
