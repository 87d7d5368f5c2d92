"""Sweeping edits: fitted in sequence, scored together, gone on with, and leaving nothing behind."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from helpers import tiny
from helpers.sweeps import DATA, HARMFUL, HARMLESS
from helpers.tolerance import close
from replib.ablation.damage import DamageMeter, DamageSets, token_kl
from replib.ablation.fit import AblationData, Cell, cells_of, fit_edits, grid
from replib.ablation.refusal_direction import mean_gaps, select_direction
from replib.ablation.refusal_score import FirstTokenScore, RefusalTokens, filtered_prompts, first_logits
from replib.ablation.sweep import ANSWERS_STAGE, FIRST_STAGE, Sweeper, best_of, ordered, sweep_layers
from replib.ablation.sweep_cost import sweep_cost
from replib.activations.capture import capture
from replib.audit.judges import PhraseJudge, encode_outcomes
from replib.core.errors import ReplibError
from replib.data.prompts import Prompt
from replib.edits.apply import applied
from replib.edits.methods import METHODS, fit_edit
from replib.models.load import load
from replib.transport.affine import AffineEdit


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


def test_a_later_edit_is_fitted_with_the_earlier_one_active(model):
    both = fit_edits(model, "actadd", DATA, [2, 0])
    first = fit_edits(model, "actadd", DATA, [0])
    with applied(model, first, positions="all"):  # where its source acts
        moved = [capture(model, x, layers=[2])[2].mean(0) for x in (HARMLESS, HARMFUL)]
    close(both[("resid_post", 2)].c, moved[0] - moved[1])
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
    close(edits["mlp_in", 1].c, means[0] - means[1])
    with pytest.raises(ReplibError, match="mlp_in of block 1"), applied(model, {("mlp_in", 2): edits["mlp_in", 1]}):
        pass


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.selected])
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


def test_a_selected_direction_is_one_cell_of_all_blocks_and_its_row_names_the_choice(model, monkeypatch):
    """Candidates are fitted on four fifths of the prompts, the last fifth chooses, and the choice acts everywhere."""
    tokens = RefusalTokens((7, 9, 11), ("w1", "w3", "w5"), 1.0, 0.0, 10, 10)
    monkeypatch.setattr(RefusalTokens, "find", classmethod(lambda *_, **__: tokens))
    sweeper = Sweeper(model, DATA, PhraseJudge())
    (cell,) = cells = grid("rfa_selected", range(3))
    assert cell == Cell("rfa_selected", (0, 1, 2), 0, "all") and sweep_cost(sweeper, cells).read > 0
    (row,) = sweeper.table(cells).itertuples()
    gaps = mean_gaps(model, HARMFUL[:-4], HARMLESS[:-3], range(3))
    chosen = select_direction(model, gaps, (HARMFUL[-4:], HARMLESS[-3:]), tokens)
    assert (row.layer, row.token, row.passed) == (chosen.layer, chosen.position, chosen.passed)
    edit = AffineEdit.ablation(chosen.r)
    x = torch.randn(4, 16)
    edits = sweeper.fitted(cell)
    assert len(edits) == 9 and all(torch.equal(e(x), edit(x)) for e in edits.values())
    assert cells_of(sweeper.table(cells)) == cells
    with pytest.raises(ReplibError, match="takes a model to select on"):
        fit_edit("rfa_selected", x, x, 0)


def test_a_prefilled_cell_begins_the_answers_and_has_no_cheap_score(model, tmp_path):
    data = replace(DATA, openings=["w30 w31"] * len(DATA.scored))
    plain = Cell("actadd", (1,), 0, "all")
    cells = [plain, plain._replace(prefilled=True)]
    sweeper = screened(model, data, store=tmp_path / "s.jsonl")
    table = sweeper.table(cells)
    assert cells_of(table) == cells and table.log_odds.isna().tolist() == [False, True]
    with applied(model, sweeper.fitted(plain), positions="all"):
        texts = [p.text for p in DATA.scored]
        answers = model.generate(texts, max_new_tokens=6, prefills=list(data.openings))
    assert table.outcomes[1] == encode_outcomes(PhraseJudge()(DATA.scored, answers))
    assert sweeper.outcomes(cells) == table.outcomes.tolist()
    assert "prefilled" not in screened(model).table([plain])
    with pytest.raises(ReplibError, match="needs the beginnings of answers"):
        screened(model).table(cells)


def test_forced_answers_fit_in_place_of_own_ones_and_are_resampled_with_their_prompts(model):
    answers = [f"w3{i % 4} w8" for i in range(20)], [f"w2{i % 4} w9" for i in range(18)]
    data = replace(DATA, answers=answers)
    (edit,) = Sweeper(model, data, PhraseJudge()).fitted(Cell("actadd", (1,), 0, "all", read="response")).values()
    means = [
        capture(model, x, responses=a, layers=[1], positions="response")[1].mean(0)
        for x, a in zip((HARMFUL, HARMLESS), answers, strict=True)
    ]
    close(edit.c, means[1] - means[0])
    drawn, pairs = data.resampled(1), set(zip(HARMFUL, answers[0], strict=True))
    assert drawn.harmful == DATA.resampled(1).harmful and set(zip(drawn.harmful, drawn.answers[0], strict=True)) < pairs
    assert data.hashes() == DATA.hashes() | {"answers": data.hashes()["answers"]}


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


def screened(model, data=DATA, **options):
    """A sweeper with a cheap score: three tokens play the part of refusals."""
    found = Sweeper(model, data, PhraseJudge(), max_new_tokens=6, **options)
    found.screen = FirstTokenScore(RefusalTokens((7, 9, 11), ("w1", "w3", "w5"), 1.0, 0.0, 10, 10))
    return found


def test_answers_are_generated_for_the_best_by_cheap_score_alone(model):
    sweeper = screened(model)
    table = sweeper.layers(ks=(1, 2), best=2)
    known = table[table.compliance.notna()]
    assert len(table) == 6 and table.log_odds.notna().all()
    assert set(known.index) == set(ordered(table, "cheap").index[:2]) and known.outcomes.str.len().eq(2).all()
    whole = sweeper.layers(ks=(1, 2))
    pd.testing.assert_frame_equal(whole.loc[known.index], known, rtol=1e-4)
    pd.testing.assert_frame_equal(whole, screened(model).layers(ks=(1, 2)), rtol=1e-4)


def test_where_there_is_no_cheap_score_all_answers_are_generated(model):
    later = screened(model).layers("actadd", positions="response", best=1)
    assert later.log_odds.isna().all() and later.kl.isna().all() and later.compliance.notna().all()
    plain = Sweeper(model, DATA, PhraseJudge(), max_new_tokens=6)  # refuses nothing
    assert plain.layers(ks=(1,), best=1).compliance.notna().all()


def test_a_share_of_an_edit_is_that_share_and_none_of_it_is_the_model(model):
    table = screened(model).layers(ks=(1,), layers=[1], strengths=(0.0, 0.5, 1.0))
    assert table.kl[0] == pytest.approx(0, abs=1e-9) and 0 < table.kl[1] < table.kl[2]
    half = {key: e * 0.5 for key, e in fit_edits(model, "pca_ot", DATA, [1], k=1).items()}
    with torch.no_grad(), applied(model, half):
        edited = first_logits(model, DATA.neutral)
    assert table.kl[1] == pytest.approx(token_kl(first_logits(model, DATA.neutral), edited).mean().item(), rel=1e-3)


def test_a_later_edit_meets_the_earlier_one_at_its_strength(model):
    half = fit_edits(model, "actadd", DATA, [0, 2], strength=0.5)
    with applied(model, {0: half["resid_post", 0]}, positions="all"):
        moved = [capture(model, x, layers=[2])[2].mean(0) for x in (HARMLESS, HARMFUL)]
    close(half["resid_post", 2].c, 0.5 * (moved[0] - moved[1]))


@pytest.mark.parametrize(("read", "written"), [("response", 6), (0, 1), (2, 3), (-2, 0)])
def test_an_edit_can_be_fitted_elsewhere_than_it_acts(model, read, written, monkeypatch):
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", None)  # no answer ends early
    sweeper = screened(model)
    (edit,) = sweeper.fitted(Cell("actadd", (1,), 0, "all", read=read)).values()
    means = [
        capture(model, x, layers=[1], positions=read, max_new_tokens=written)[1].mean(0) for x in (HARMLESS, HARMFUL)
    ]
    close(edit.c, means[0] - means[1])
    elsewhere = sweeper.layers("actadd", layers=[1], read=read)
    assert elsewhere.kl[0] != sweeper.layers("actadd", layers=[1]).kl[0]


def test_prompts_whose_answer_ends_before_the_position_do_not_fit_and_their_number_is_said(model, monkeypatch, caplog):
    """The end of an answer is a token that the model writes early for some prompts."""
    ends = model.model.generation_config
    third = replace(METHODS["actadd"], read=2)
    monkeypatch.setattr(ends, "eos_token_id", None)
    answers = {p: model.written(model.encode([p]), 3).input_ids[0, -3:].tolist() for p in HARMFUL + HARMLESS}
    long = [[p for p in prompts if 8 not in answers[p]] for prompts in (HARMFUL, HARMLESS)]
    monkeypatch.setattr(ends, "eos_token_id", 8)
    edit = fit_edits(model, third, DATA, [1])["resid_post", 1]
    means = [capture(model, x, layers=[1], positions=2, max_new_tokens=3)[1].mean(0) for x in long]
    close(edit.c, means[1] - means[0])
    said = f"answers to {18 - len(long[1])} of 18 harmless prompts end before position 2"
    assert 2 < len(long[1]) < 18 and said in caplog.text
    row = screened(model).table([Cell("actadd", (1,), 0, "all", read=2)]).iloc[0]
    assert (row.n_harmful, row.n_harmless) == tuple(map(len, long))
    monkeypatch.setattr(ends, "eos_token_id", list({first for first, *_ in answers.values()}))
    with pytest.raises(ReplibError, match="20 of 20 harmful prompts end before position 2, so 0 are left.*earlier"):
        fit_edits(model, third, DATA, [1])


def test_the_store_tells_strengths_positions_and_stages_apart(model, tmp_path):
    cells = grid("pca_ot", [0, 1], ks=(1,), positions=("all", None), strengths=(0.5, 1.0), reads=(None, -2))
    first = screened(model, store=tmp_path / "s.jsonl")
    table = first.table(cells, best=1)
    assert len(table) == 16 and table.kl.nunique() == 16
    again = screened(model, store=tmp_path / "s.jsonl")
    assert not again.missing(cells, (FIRST_STAGE,)) and len(again.missing(cells, (FIRST_STAGE, ANSWERS_STAGE))) > 0
    again.score = None  # nothing is left to do
    pd.testing.assert_frame_equal(again.table(cells, best=1), table)


def test_fits_on_prompts_drawn_anew_differ_and_come_back_by_their_seed(model):
    cells = grid("pca_ot", [1], ks=(1,))
    table = screened(model).over_fits(cells, (0, 1, 0))
    assert table.fit_seed.tolist() == [0, 1, 0] and (table.n_harmful == 20).all() and table.scored.nunique() == 1
    assert table.kl[0] == table.kl[2] != table.kl[1] and table.fit.nunique() == 2
    drawn = DATA.resampled(0)
    assert set(drawn.harmful) < set(HARMFUL) and len(drawn.harmful) == len(HARMFUL) and drawn.scored == DATA.scored


def test_damage_stands_beside_each_edit_and_is_kept(model, tmp_path):
    sweeper = screened(model, store=tmp_path / "s.jsonl")
    gauge = DamageMeter(
        model, DamageSets({"harmless": [Prompt("w1 w2"), Prompt("w3")]}, tokens=3), PhraseJudge(), max_new_tokens=4
    )
    cells = grid("pca_ot", [0, 2], ks=(1,))
    table = sweeper.damage(cells, gauge)
    assert table.groupby("layer").size().tolist() == [6, 6] and table.k.eq(1).all()
    expected = gauge(fit_edits(model, "pca_ot", DATA, [2], k=1))
    pd.testing.assert_frame_equal(table[table.layer == 2][expected.columns].reset_index(drop=True), expected, rtol=1e-3)
    again = screened(model, store=tmp_path / "s.jsonl")
    again.fitted = None  # nothing is left to do
    pd.testing.assert_frame_equal(again.damage(cells, gauge), table)


@pytest.mark.parametrize("best", [None, 1])
def test_the_price_is_what_is_missing_and_then_nothing(model, best):
    sweeper = screened(model, batch_size=4)
    cells = [*grid("pca_ot", range(3), ks=(1, 2)), *grid("actadd", range(3), positions=("response",))]
    price = sweep_cost(sweeper, cells, best=best)
    answers = 9 if best is None else 1 + 3
    assert (price.cells, price.missing) == (9, 9) and price.read > 0
    assert price.written == answers * len(DATA.scored) * 6 + 38 * 24
    assert price.passes == (3 + 2 if best is None else 3 + 2 + 1 + 2)  # two edits a pass
    sweeper.table(cells, best=best)
    after = sweep_cost(sweeper, cells, best=best)
    assert (after.missing, after.passes, after.read, after.written) == (0, 0, 0, 0) and "0 of them" in str(after)


def test_what_cannot_be_meant_is_refused_before_anything_runs(model):
    sweeper = screened(model)
    sweeper.score = None
    with pytest.raises(ReplibError, match="fit 1 to 16 axes"):
        sweeper.layers(ks=(1, 17))
    with pytest.raises(ReplibError, match="Strength 2.0 is outside.*extrapolate=True"):
        sweeper.layers(ks=(1,), strengths=(2.0,))
    with pytest.raises(ReplibError, match="Strength -0.5 is outside.*multiply the edits"):
        fit_edits(model, "pca_ot", DATA, [1], strength=-0.5)


def test_one_two_and_all_blocks(model):
    table = Sweeper(model, DATA, PhraseJudge()).depths(1, k=1)
    assert [tuple(x) for x in table.layers] == [(1,), (0, 1), (1, 2), (0, 1, 2)]


def test_both_classes_are_needed_and_fitted_prompts_are_not_scored():
    with pytest.raises(ReplibError, match="No harmless prompts"):
        AblationData(HARMFUL, [], DATA.scored, DATA.neutral)
    with pytest.raises(ReplibError, match="1 scored prompts fit the edits"):
        AblationData(HARMFUL, HARMLESS, [Prompt(HARMFUL[3])], DATA.neutral)


def test_prompts_that_the_model_treats_as_their_class_should_be_fit_and_are_counted(model):
    likely = first_logits(model, HARMFUL + HARMLESS).softmax(-1).mean(0)
    order = likely.argsort()
    some, none = (
        RefusalTokens(tuple(ids.tolist()), (), 1.0, 0.0, 1, 1)
        for ids in (order[likely[order].cumsum(0) < 0.5], order[:1])
    )
    kept = DATA.filtered(model, some)
    left = filtered_prompts(model, HARMFUL, HARMLESS, some)
    assert (kept.harmful, kept.harmless) == (left.harmful, left.harmless)
    assert kept.counts() == {"n_harmful": len(kept.harmful), "n_harmless": len(kept.harmless)} != DATA.counts()
    with pytest.raises(ReplibError, match="0 of 20 harmful prompts are refused"):
        DATA.filtered(model, none)


def test_a_block_that_does_not_exist(model):
    with pytest.raises(ReplibError, match="Layer 5 is not in"):
        sweep_layers(model, DATA, PhraseJudge(), layers=[5])


def test_edits_that_turn_as_many_prompts_are_ordered_by_what_else_they_do():
    """A deeper log-odds of an edit that has turned all prompts is no more success."""
    table = pd.DataFrame({"turned": [1, 1, 0.5, 1], "log_odds": [-30, -5, -1, -20], "kl": [9, 0.1, 0, 2]})
    assert ordered(table, "cheap").index.tolist() == [1, 3, 0, 2]
    assert ordered(table, "log_odds").index.tolist() == [0, 3, 1, 2]


def test_where_none_is_turned_the_nearest_comes_first():
    table = pd.DataFrame({"turned": [0.0, 0, 0.1], "log_odds": [5, 1, 4], "kl": [0, 3, 2]})
    assert ordered(table, "cheap").index.tolist() == [2, 1, 0]


def test_the_best_of_equals_is_the_gentlest():
    table = pd.DataFrame({"model": ["a", "a", "a", "b"], "compliance": [0.9, 1, 1, 0], "kl": [0, 3, 2, 1]})
    assert best_of(table, "model").kl.tolist() == [2, 1]


def test_a_group_without_a_name_is_a_group_and_what_is_not_known_is_left_out():
    table = pd.DataFrame({"read": [None, None, 0], "compliance": [0.1, 0.9, math.nan], "kl": [0, 3, 2]})
    assert best_of(table, "read").compliance.tolist() == [0.9]
    with pytest.raises(ReplibError, match="not ordered by 'kl'"):
        ordered(table, "kl")
