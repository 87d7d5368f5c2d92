"""Refusal directions: what each score is, which one is chosen, and the plane of angular steering."""

import pandas as pd
import pytest
import torch

from helpers import tiny
from helpers.tolerance import close
from replib.ablation.refusal_direction import (
    Direction,
    Filters,
    angular_edits,
    mean_gaps,
    select_direction,
    steering_plane,
)
from replib.ablation.refusal_score import RefusalTokens, filtered_prompts, first_logits
from replib.activations.capture import capture
from replib.core.errors import ReplibError
from replib.edits.apply import applied
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


def test_a_direction_is_removed_or_added_in_its_own_model_alone(model, tmp_path):
    chosen = Direction(torch.randn(16), 1, -1, True, pd.DataFrame())
    x = capture(model, HARMLESS, site="resid_pre", layers=[1])[1]
    with applied(model, chosen.addition(model, 2.0), positions="all"):
        moved = capture(model, HARMLESS, layers=[1])[1]
    with applied(model, {0: AffineEdit.shift(2 * chosen.r)}, positions="all"):  # what leaves a block enters the next
        torch.testing.assert_close(capture(model, HARMLESS, layers=[1])[1], moved)
    assert len(x) and chosen.ablation(model).keys() >= {("resid_pre", 0), ("mlp_out", 2)}
    other = load(tiny.save_model(tmp_path, "qwen2"))
    with pytest.raises(ReplibError, match="fitted for"), applied(other, chosen.ablation(model)):
        pass


# --------------------------------------------------------------------------------------------- angular steering
def test_the_plane_holds_the_likest_candidate_and_their_first_axis():
    from sklearn.decomposition import PCA

    found = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).double() + 0.5
    plane = steering_plane(found).double()
    torch.testing.assert_close(plane.T @ plane, torch.eye(2).double(), atol=1e-6, rtol=0)
    cosines = torch.nn.functional.cosine_similarity(found[:, None], found[None], dim=-1).mean(1)
    likest, axis = found[cosines.argmax()], torch.from_numpy(PCA(1).fit(found.numpy()).components_[0])
    torch.testing.assert_close(plane[:, 0], likest / likest.norm(), atol=1e-6, rtol=0)
    torch.testing.assert_close(plane @ (plane.T @ axis), axis, atol=1e-6, rtol=0)


def test_directions_that_span_no_plane():
    with pytest.raises(ReplibError, match="span no plane"):
        steering_plane(torch.ones(4, 1) * torch.randn(1, 16))


def test_what_enters_each_sublayer_is_turned(model):
    edits = angular_edits(model, HARMFUL, HARMLESS, angle=180.0)
    assert set(edits) == {(site, i) for site in ("attn_in", "mlp_in") for i in range(3)}
    b1 = edits["attn_in", 0].plane[:, 0]
    before = first_logits(model, HARMFUL)
    with applied(model, edits, positions="all"):
        edited = first_logits(model, HARMFUL)
    turned = edits["mlp_in", 1](torch.randn(100, 16))
    assert (turned @ b1 <= 1e-5).all()
    assert not torch.allclose(edited, before) and torch.equal(first_logits(model, HARMFUL), before)


# --------------------------------------------------------------------------------------------- where the truth is known
@pytest.mark.slow
def test_refusal_planted_in_blocks_5_and_6_is_found_above_them(tmp_path):
    """The whole path on the organism: tokens, filter, candidates, choice, and edits of both kinds."""
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
    with applied(model, chosen.ablation(model), positions="all"):
        assert tokens.scores(first_logits(model, val[0])).max() < 0
    with applied(model, chosen.addition(model, 1.0), positions="all"):
        assert tokens.scores(first_logits(model, val[1])).median() > 0
