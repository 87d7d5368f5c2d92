"""Random edits: what they are fitted on, that all choices come up, and that a restored adversary draws the same."""

from collections import Counter

import pytest
import torch

from helpers import tiny
from replib.activations.capture import capture
from replib.core.errors import ReplibError
from replib.data.prompts import Contrast, Dialogue
from replib.defences.adversary import Adversary, EditDistribution, SampledEdit
from replib.edits.apply import applied, applied_each
from replib.edits.methods import fit_edit
from replib.models.load import load

HARMFUL = [Contrast(f"w{i} w{i + 5}", "w30 w31", f"w{i} w33 w34") for i in range(12)]
HARMLESS = [Dialogue(f"w{i} w9 w3", f"w{i} w8") for i in range(12)]
SMALL = EditDistribution(ks=(1, 2), prompts=6, reads=("last_prompt", "response"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture
def adversary(model):
    made = Adversary(SMALL, HARMFUL, HARMLESS, seed=3)
    made.fit(model)
    return made


def parts(drawn):
    return [(key, edit.u, edit.v, edit.c, edit.s) for key, edit in drawn.edits.items()]


def same(a, b):
    return a[1:] == b[1:] and str(parts(a)) == str(parts(b))


# ------------------------------------------------------------------------------------------- what is drawn
def test_an_edit_is_the_methods_own_fit_on_the_model_as_it_is(model):
    """All prompts are read, so which of them were drawn does not matter; only their order does."""
    for read in ("last_prompt", "response"):
        arsenal = EditDistribution(("pca_ot",), (1,), (2,), (read,), ("all",), (0.5, 0.5), prompts=12)
        adversary = Adversary(arsenal, HARMFUL, HARMLESS)
        adversary.fit(model)
        drawn = adversary.draw(model)
        answers = ([c.unsafe_response for c in HARMFUL], [d.response for d in HARMLESS])
        x, y = (
            capture(model, [r.prompt for r in rows], responses=given, layers=[1], positions=read)[1]
            for rows, given in zip((HARMFUL, HARMLESS), answers, strict=True)
        )
        ((key, edit),) = fit_edit("pca_ot", x, y, 1, k=2).items()
        z = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
        moved = drawn.edits[key].displacement(z)
        torch.testing.assert_close(moved, edit.displacement(z) / 2, atol=1e-4, rtol=1e-3)
        assert drawn.positions == "all" and f"read at {read}, strength 0.50" in drawn.name


def test_every_choice_comes_up_and_none_outside_the_arsenal(model, adversary):
    drawn = [adversary.draw(model) for _ in range(300)]
    words = Counter(word for d in drawn for word in d.name.replace(",", "").split())
    strengths = [float(d.name.rpartition(" ")[2]) for d in drawn]
    for choices in (SMALL.methods, map(str, SMALL.ks), SMALL.reads):
        assert all(words[c] > 20 for c in choices)
    assert {key[1] for d in drawn for key in d.edits} == {0, 1, 2}
    assert set(Counter(d.positions for d in drawn)) == set(SMALL.positions)
    assert 0.5 <= min(strengths) < 0.55 and 0.95 < max(strengths) <= 1.0


def test_a_method_that_acts_everywhere_is_drawn_for_every_block(model):
    adversary = Adversary(EditDistribution(("rfa",), prompts=6, ks=(1,)), HARMFUL, HARMLESS)
    adversary.fit(model)
    assert len(adversary.draw(model).edits) == 3 * model.n_layers


# ------------------------------------------------------------------------------------------- going on
def test_a_restored_adversary_draws_the_same_and_an_empty_state_begins_anew(model, adversary):
    before = {name: x.clone() for name, x in adversary.state().items()}
    first = [adversary.draw(model) for _ in range(4)]
    other = Adversary(SMALL, HARMFUL, HARMLESS, seed=8)
    other.restore(before)
    assert all(same(a, other.draw(model)) for a in first)
    adversary.restore({})
    assert adversary.fitted is None
    adversary.fit(model)
    assert all(torch.equal(x, before[name]) for name, x in adversary.state().items())


def test_another_seed_draws_other_edits(model, adversary):
    other = Adversary(SMALL, HARMFUL, HARMLESS, seed=4)
    other.fit(model)
    assert not any(same(adversary.draw(model), other.draw(model)) for _ in range(4))


# ------------------------------------------------------------------------------------------- at work
def test_each_group_meets_its_own_edit_at_its_own_tokens(model, adversary):
    drawn = [adversary.draw(model) for _ in range(4)] + [SampledEdit({}, "all")]
    prompts, answers = ["w1 w2 w3", "w4"], ["w5 w6", "w7 w8 w9"]
    with torch.no_grad(), applied_each(model, [d.edited for d in drawn]):
        together = model.forward(model.encode(prompts * 5, answers * 5)).chunk(5)
    for one, logits in zip(drawn, together, strict=True):
        with torch.no_grad(), applied(model, one.edits, positions=one.positions):
            alone = model.forward(model.encode(prompts, answers))
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-3)


def test_after_an_exception_nothing_of_the_edits_is_left(model, adversary):
    batch = model.encode(["w1 w2"] * 5)
    before = model.forward(batch)
    drawn = [adversary.draw(model).edited for _ in range(5)]
    with pytest.raises(ZeroDivisionError), applied_each(model, drawn):
        raise ZeroDivisionError
    assert torch.equal(model.forward(batch), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def test_late_blocks_count_as_often_as_they_are_told_to():
    assert EditDistribution(late=3).blocks(6) == [0, 1, 2, 3, 4, 5, 4, 5, 4, 5]
    assert EditDistribution(layers=(1, 5), late=2).blocks(6) == [1, 5, 5] and EditDistribution().blocks(3) == [0, 1, 2]


# ------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"methods": ()}, "without methods edits nothing"),
        ({"methods": ("nonsense",)}, "Unknown method 'nonsense'"),
        ({"methods": ("mean_act",)}, "mean_act is fitted on means over whole prompts"),
        ({"positions": ("last_prompt", "decode")}, "positions='decode' is unknown"),
        ({"positions": ()}, "without positions edits nothing"),
        ({"reads": ("prompt",)}, "reads='prompt' is unknown"),
        ({"strength": (-0.1, 1.0)}, "within 0 and 1"),
        ({"strength": (0.5, 1.5)}, "within 0 and 1"),
        ({"strength": (0.9, 0.5)}, "give smallest and largest"),
        ({"ks": (1, 48)}, "cannot fit K"),
        ({"ks": (0,)}, "cannot fit K"),
        ({"late": 0}, "late=0 must be 1 or more"),
    ],
)
def test_an_arsenal_that_cannot_be_drawn_from_is_named(change, reason):
    with pytest.raises(ReplibError, match=reason):
        EditDistribution(**change)


def test_blocks_outside_the_model_and_too_few_prompts_are_named():
    with pytest.raises(ReplibError, match="Layer 3 is outside the model's blocks 0 to 2"):
        EditDistribution(layers=(0, 3), prompts=6, ks=(1,)).check(3, HARMFUL, HARMLESS)
    with pytest.raises(ReplibError, match="12 harmful prompts to fit edits on, but prompts=48"):
        EditDistribution().check(3, HARMFUL, HARMLESS)
    with pytest.raises(ReplibError, match="0 harmless prompts"):
        SMALL.check(3, HARMFUL, [])


def test_nothing_is_drawn_before_anything_was_read(model):
    with pytest.raises(ReplibError, match="No activations to fit edits on"):
        Adversary(SMALL, HARMFUL, HARMLESS).draw(model)
