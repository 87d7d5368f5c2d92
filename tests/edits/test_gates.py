"""Gates: who is edited, who keeps every bit, and what a fitted gate is."""

from dataclasses import replace

import pytest
import torch

from helpers import tiny
from helpers.steered import PROMPTS, halves, next_input, random_edit
from helpers.tolerance import close
from replib.core.errors import ReplibError
from replib.edits.apply import applied, place
from replib.edits.gates import Gate
from replib.models.load import load
from replib.transport.affine import AffineEdit


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


@torch.no_grad()
@pytest.mark.parametrize("positions", ["last_prompt", "all_prompt", "response", "all"])
def test_a_gate_by_prompt_edits_its_rows_as_without_it_and_leaves_the_others_every_bit(model, positions):
    batch, gate, edits = model.encode(PROMPTS, ["w8 w9"] * 3), halves(model), {1: random_edit()}
    plain = model.forward(batch)
    with applied(model, edits, positions=positions):
        edited = model.forward(batch)
    with applied(model, edits, positions=positions, gate=gate):
        found = model.forward(batch)
    assert torch.equal(found[:2], plain[:2]) and not torch.equal(found[2], plain[2])
    close(found[2], edited[2])


@pytest.mark.parametrize("positions", ["all", "decode"])
def test_what_a_gate_decided_of_a_prompt_holds_for_its_answer(model, positions):
    edits, gate = {1: 3 * random_edit()}, halves(model)
    plain = model.generate(PROMPTS, max_new_tokens=6)
    with applied(model, edits, positions=positions):
        edited = model.generate(PROMPTS, max_new_tokens=6)
    with applied(model, edits, positions=positions, gate=gate):
        found = model.generate(PROMPTS, max_new_tokens=6)
        alone = [model.generate([p], max_new_tokens=6)[0] for p in PROMPTS]
    assert edited[2] != plain[2] and edited[0] != plain[0]
    assert found == alone == [*plain[:2], edited[2]]


def test_a_gate_by_token_looks_at_each(model):
    batch, gate = model.encode(PROMPTS), replace(halves(model), per="token")
    before = next_input(model, batch, 0)
    with applied(model, {0: AffineEdit.shift(torch.ones(16))}, positions="all", gate=gate):
        moved = next_input(model, batch, 0) - before
    opened = gate.scores(before) > 0
    assert opened.any() and not opened.all()
    torch.testing.assert_close(moved, opened[..., None].expand_as(before).float(), atol=1e-5, rtol=0)


def test_the_fitted_gate_is_the_linear_discriminant():
    """With a ridge near zero and many samples, scikit-learn's; with a huge one, the nearest mean."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    g = torch.Generator().manual_seed(0)
    mix, fresh = torch.randn(5, 5, generator=g, dtype=torch.double), torch.randn(200, 5, generator=g)
    x, y = (torch.randn(80, 5, generator=g, dtype=torch.double) @ mix + shift for shift in (0.5, -0.5))
    lda = LinearDiscriminantAnalysis(priors=[0.5, 0.5]).fit(torch.cat([x, y]), [1] * 80 + [0] * 80)
    found = Gate.fit(x, y, 0, ridge=1e-9)
    assert (found.scores(fresh) > 0).tolist() == lda.predict(fresh).astype(bool).tolist()
    near = (fresh - x.mean(0)).norm(dim=1) < (fresh - y.mean(0)).norm(dim=1)
    assert torch.equal(Gate.fit(x, y, 0, ridge=1e9).scores(fresh) > 0, near)


def test_a_gate_needs_no_more_coordinates_than_samples_span():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 40, generator=g).double() + 1, torch.randn(7, 40, generator=g).double()
    rows = torch.cat([x - x.mean(0), y - y.mean(0)])
    spread = rows.T @ rows / 11
    dense = torch.linalg.solve(spread + spread.trace() / 40 * torch.eye(40).double(), x.mean(0) - y.mean(0))
    torch.testing.assert_close(Gate.fit(x, y, 0).w.double(), dense * spread.trace() / 40, atol=1e-5, rtol=1e-4)


def test_a_gate_is_refused_by_another_model_or_layer(model):
    edit, gate = {2: random_edit()}, Gate(torch.ones(16), 0.0, 1).bound(place(model, "resid_post", 1))
    with applied(model, edit, gate=gate):
        pass
    lower, foreign = replace(gate, layer=0), gate.bound(replace(gate.origin, model="another"))
    for wrong in (lower, foreign):
        with pytest.raises(ReplibError, match="resid_post of block 1 .* not for"), applied(model, edit, gate=wrong):
            pass


def test_bad_gates_are_named():
    with pytest.raises(ReplibError, match="Unknown gate per='row'"):
        Gate(torch.ones(16), 0.0, 1, per="row")
    with pytest.raises(ReplibError, match="one mean"):
        Gate.fit(torch.ones(3, 4), torch.ones(3, 4), 0)
