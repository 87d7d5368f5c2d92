"""Refusal directions: the scores of each candidate, and the selection among them."""

import pandas as pd
import pytest
import torch

from helpers import tiny
from helpers.tolerance import close
from replib.ablation.refusal_direction import (
    Filters,
    mean_gaps,
    select_direction,
)
from replib.ablation.refusal_score import RefusalTokens, filtered_prompts, first_logits
from replib.activations.capture import capture
from replib.core.errors import ReplibError
from replib.edits.apply import applied
from replib.edits.methods import everywhere
from replib.models.load import load
from replib.study.study import Study
from replib.transport.affine import AffineEdit

HARMFUL, HARMLESS = [f"w{i} w{i + 1}" for i in range(12)], [f"w{i} w{2 * i % 40} w3" for i in range(20, 30)]
TOKENS = RefusalTokens((7, 9, 11), ("w1", "w3", "w5"), 1.0, 0.0, 1, 1)
OPEN = Filters(kl=None, induce=None, depth=1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def gaps(model):
    return mean_gaps(model, HARMFUL, HARMLESS, range(3))


def test_there_is_a_direction_for_every_block_and_template_token(model, gaps):
    assert set(gaps) == {(layer, p) for layer in range(3) for p in (-2, -1)}  # the template ends with <end> <ask>
    x, y = (capture(model, p, site="resid_pre", layers=[1], positions=-2)[1] for p in (HARMFUL, HARMLESS))
    close(gaps[1, -2], x.mean(0) - y.mean(0))


@torch.no_grad()
def by_hand(model, r, layer):
    """The three scores with the model's own modules wrapped, no hook and no edit."""
    unit = r / r.norm()
    remove = lambda x: x - (x @ unit)[..., None] * unit  # noqa: E731
    plain = [single(model, p) for p in HARMLESS]
    undo = []
    for block in model.blocks:
        undo += [wrap(block, before=remove), wrap(block.self_attn, after=remove), wrap(block.mlp, after=remove)]
    bypass = torch.stack([score(single(model, p)) for p in HARMFUL]).mean()
    edited = [single(model, p) for p in HARMLESS]
    [back() for back in undo]
    logs = [(p.log_softmax(-1), q.log_softmax(-1)) for p, q in zip(plain, edited, strict=True)]
    kl = torch.stack([(p.exp() * (p - q)).sum() for p, q in logs]).mean()
    back = wrap(model.blocks[layer], before=lambda x: x + r)
    induce = torch.stack([score(single(model, p)) for p in HARMLESS]).mean()
    back()
    return {"bypass": bypass.item(), "induce": induce.item(), "kl": kl.item()}


def single(model, prompt):
    return model.forward(model.encode([prompt]))[0, -1].double()


def score(logits):
    p = logits.softmax(-1)[[7, 9, 11]].sum()
    return torch.log(p + 1e-8) - torch.log(1 - p + 1e-8)


def wrap(module, *, before=lambda x: x, after=lambda x: x):
    """Replace what a module is given, or gives; returns what undoes it."""
    forward = module.forward

    def run(*args, **kwargs):
        args, kwargs = ((before(args[0]), *args[1:]), kwargs) if args else (args, kwargs)
        if "hidden_states" in kwargs:
            kwargs = kwargs | {"hidden_states": before(kwargs["hidden_states"])}
        out = forward(*args, **kwargs)
        return (after(out[0]), *out[1:]) if isinstance(out, tuple) else after(out)

    module.forward = run
    return lambda: delattr(module, "forward")


def test_scores_are_those_of_the_source_said_again(model, gaps):
    before = first_logits(model, HARMLESS)
    chosen = select_direction(model, gaps, (HARMFUL, HARMLESS), TOKENS, filters=OPEN)
    assert set(chosen.table.layer) == {1, 2} and chosen.passed  # template tokens are embedded alike: none at block 0
    for row in chosen.table.to_dict("records")[::2]:
        expected = by_hand(model, gaps[row["layer"], row["position"]], row["layer"])
        assert {k: row[k] for k in expected} == pytest.approx(expected, abs=2e-4, rel=1e-3)
    best = chosen.table.loc[chosen.table.bypass.idxmin()]
    assert (chosen.layer, chosen.position) == (best.layer, best.position)
    assert torch.equal(chosen.r, gaps[chosen.layer, chosen.position])
    assert torch.equal(first_logits(model, HARMLESS), before)


def test_filters_are_applied_as_in_the_source():
    nan = float("nan")
    table = pd.DataFrame(
        {
            "bypass": [0, 0, 0, nan, 0, 0],
            "induce": [1, 0, -0.1, 1, nan, 1],
            "kl": [0.1, 0.05, 0.05, 0.05, 0.05, 0.11],
        }
    )
    assert Filters().passed(table).tolist() == [True, True, False, False, False, False]
    assert Filters(kl=None, induce=None).passed(table).tolist() == [True, True, True, False, False, True]


def test_where_all_are_filtered_the_best_is_returned_and_said(model, gaps):
    with pytest.warns(UserWarning, match="None of 2 directions .* is a finding"):
        chosen = select_direction(model, gaps, (HARMFUL, HARMLESS), TOKENS, filters=Filters(kl=-1.0))
    assert not chosen.passed and set(chosen.table.layer) == {1}  # int(0.8 * 3) blocks from below
    bypass = chosen.table.set_index(["layer", "position"]).bypass
    assert bypass.min() == bypass[chosen.layer, chosen.position]


def test_no_candidate_is_left(model, gaps):
    with pytest.raises(ReplibError, match="No candidate direction lies below block 2"):
        select_direction(model, {(2, -1): gaps[2, -1]}, (HARMFUL, HARMLESS), TOKENS)


@pytest.mark.slow
def test_refusal_planted_in_blocks_5_and_6_is_found_above_them(tmp_path):
    """The whole path on the organism: tokens, filter, candidates, choice, and edits with it."""
    study = Study.open(model="planted", out=tmp_path)
    model = study.model
    fit, val = ([[p.text for p in getattr(x, s)[:24]] for x in (study.harmful, study.harmless)] for s in ("fit", "val"))
    tokens = RefusalTokens.find(model, *val)
    assert tokens.coverage > 0.9 and tokens.overlap < 0.1
    kept = filtered_prompts(model, *fit, tokens)
    chosen = select_direction(
        model, mean_gaps(model, kept.harmful, kept.harmless, range(5, 9)), (val[0][:8], val[1][:8]), tokens
    )
    assert chosen.passed and chosen.layer >= 6  # the input of block 6 is the output of block 5
    with applied(model, everywhere(AffineEdit.ablation(chosen.r), model.n_layers), positions="all"):
        assert tokens.scores(first_logits(model, val[0])).max() < 0
    with applied(model, {("resid_pre", chosen.layer): AffineEdit.shift(chosen.r)}, positions="all"):
        assert tokens.scores(first_logits(model, val[1])).median() > 0
