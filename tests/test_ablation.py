"""Fitting and sweeping edits: each method against its formula, and what must not be possible."""

import numpy as np
import ot
import pandas as pd
import pytest
import tiny
import torch

from replib.ablation import METHODS, AblationData, Sweeper, best_of, fit_edit, fit_edits, linear_act, sweep_layers
from replib.activations import capture
from replib.edits import applied
from replib.errors import ReplibError
from replib.judges import PhraseJudge
from replib.models import load
from replib.prompts import Prompt

HARMFUL = [f"w{i} w{i + 1} w{i + 2}" for i in range(0, 20)]
HARMLESS = [f"w{i} w{(2 * i) % 40}" for i in range(20, 38)]
DATA = AblationData(HARMFUL, HARMLESS, [Prompt("w39 w38", "harmful"), Prompt("w37 w36", "harmful")], ["w1 w39", "w2"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def clouds():
    torch.manual_seed(0)
    return torch.randn(40, 16) @ torch.randn(16, 16), torch.randn(30, 16) + 2


def test_pca_ot_gives_the_target_mean_and_covariance_in_its_subspace(clouds):
    harmful, harmless = clouds
    edit = fit_edit("pca_ot", harmful, harmless, 0, k=3)[("resid_post", 0)]
    basis = torch.linalg.qr(edit.v.float())[0]
    moved, target = edit(harmful) @ basis, harmless @ basis
    torch.testing.assert_close(moved.mean(0), target.mean(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(moved.T.cov(), target.T.cov(), atol=2e-3, rtol=2e-3)
    outside = torch.eye(16) - basis @ basis.T
    torch.testing.assert_close(edit(harmful) @ outside, harmful @ outside, atol=1e-4, rtol=1e-4)


def test_actadd_moves_one_mean_onto_the_other(clouds):
    harmful, harmless = clouds
    edit = fit_edit("actadd", harmful, harmless, 4)[("resid_post", 4)]
    torch.testing.assert_close(edit(harmful).mean(0), harmless.mean(0), atol=1e-5, rtol=1e-4)


def test_rfa_removes_the_mean_gap_everywhere_it_could_be_written(clouds):
    harmful, harmless = clouds
    edits = fit_edit("rfa", harmful, harmless, 1, depth=3)
    assert set(edits) == {(s, i) for s in ("resid_pre", "attn_out", "mlp_out") for i in range(3)}
    gap = harmful.mean(0) - harmless.mean(0)
    torch.testing.assert_close(edits[("mlp_out", 2)](harmful) @ gap, torch.zeros(40), atol=1e-3, rtol=0)


def test_linear_act_is_least_squares_between_sorted_samples(clouds):
    a, b = clouds[0][:30].double().numpy(), clouds[1].double().numpy()
    edit = linear_act(*map(torch.from_numpy, (a, b)))
    for j in range(16):
        slope, bias = np.polyfit(np.sort(a[:, j]), np.sort(b[:, j]), 1)
        assert 1 + edit.s[j].item() == pytest.approx(slope, rel=1e-4)
        assert edit.c[j].item() == pytest.approx(bias, abs=1e-4)


def test_linear_act_of_one_coordinate_is_near_exact_transport(clouds):
    """For sorted samples of equal size the optimal coupling pairs ranks; the line is its best affine fit."""
    a, b = clouds[0][:30, :1], clouds[1][:, :1]
    plan = ot.emd([], [], ot.dist(a.double().numpy(), b.double().numpy()))
    paired = torch.from_numpy(30 * plan @ b.double().numpy()).float()
    residual = linear_act(a, b)(a) - paired
    assert residual.mean().abs() < 1e-4 and (residual * a).mean().abs() < 1e-3


def test_a_constant_coordinate_is_only_shifted():
    a, b = torch.ones(5, 2), torch.randn(5, 2)
    edit = linear_act(a, b)
    assert not edit.s.any()
    torch.testing.assert_close(edit(a).mean(0), b.mean(0), atol=1e-6, rtol=1e-5)


def test_a_later_edit_is_fitted_with_the_earlier_one_active(model):
    both = fit_edits(model, "actadd", DATA, [2, 0])
    first = fit_edits(model, "actadd", DATA, [0])
    with applied(model, first):
        moved = [capture(model, x, layers=[2])[2].mean(0) for x in (HARMLESS, HARMFUL)]
    torch.testing.assert_close(both[("resid_post", 2)].c, moved[0] - moved[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[("resid_post", 0)].c, first[("resid_post", 0)].c)


@pytest.mark.parametrize("method", METHODS)
def test_a_sweep_has_a_row_a_block_and_leaves_the_model_as_it_was(model, method):
    batch = model.encode(HARMFUL[:3])
    with torch.no_grad():
        before = model.forward(batch)
        table = sweep_layers(model, DATA, PhraseJudge(), method, ks=(1, 2))
        assert torch.equal(model.forward(batch), before)
    assert len(table) == (6 if method == "pca_ot" else 3)
    assert (table.n == 2).all() and (table.low <= table.compliance).all() and (table.compliance <= table.high).all()
    assert (table.kl >= -1e-6).all() and table.kl.max() > 0


def test_a_sweep_goes_on_where_it_stopped(model, tmp_path, monkeypatch):
    store = tmp_path / "sweep.jsonl"
    Sweeper(model, DATA, PhraseJudge(), store=store).layers(ks=(1,), layers=[0, 1])
    again = Sweeper(model, DATA, PhraseJudge(), store=store)
    scored, score = [], again.score
    monkeypatch.setattr(again, "score", lambda cells: scored.extend(cells) or score(cells))
    assert len(again.layers(ks=(1,))) == 3 and [cell.layers for cell in scored] == [(2,)]


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda a, b: fit_edit("magic", a, b, 0), "Unknown method 'magic'.*pca_ot"),
        (lambda a, b: fit_edit("pca_ot", a[:3], b, 0, k=8), "8"),
        (lambda a, b: fit_edit("pca_ot", a[:0], b, 0), "."),
        (lambda a, b: fit_edit("pca_ot", a * float("nan"), b, 0), "."),
    ],
)
def test_bad_fits_are_named(clouds, call, reason):
    with pytest.raises(ReplibError, match=reason):
        call(*clouds)


def test_both_classes_are_needed_and_fitted_prompts_are_not_scored():
    with pytest.raises(ReplibError, match="No harmless prompts"):
        AblationData(HARMFUL, [], DATA.scored, DATA.neutral)
    with pytest.raises(ReplibError, match="1 scored prompts were used to fit"):
        AblationData(HARMFUL, HARMLESS, [Prompt(HARMFUL[3])], DATA.neutral)


def test_a_block_that_does_not_exist(model):
    with pytest.raises(ReplibError, match="Layer 5 is not in"):
        sweep_layers(model, DATA, PhraseJudge(), layers=[5])
