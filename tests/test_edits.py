"""Edits: algebra, where they act, and that nothing of them is left."""

import pytest
import tiny
import torch

from replib.activations import capture, capture_sites
from replib.affine import AffineEdit
from replib.edits import applied
from replib.errors import ReplibError
from replib.models import load

PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.save_model(tmp_path_factory.mktemp("llama")))


def random_edit(seed=0, d=16, r=3, *, diagonal=False):
    g = torch.Generator().manual_seed(seed)
    u, v, c, s = (torch.randn(*shape, generator=g) for shape in ((d, r), (d, r), (d,), (d,)))
    return AffineEdit(u, v, c, s if diagonal else None)


class Counting(AffineEdit):
    """Changes nothing and notes how many tokens it was given."""

    seen: list[int] = []

    def __call__(self, x):
        self.seen.append(x.shape[:-1].numel())
        return x

    def __mul__(self, _):
        return self

    def to(self, _):
        return self


def test_an_edit_is_the_dense_affine_map():
    e, x = random_edit(diagonal=True), torch.randn(5, 16)
    dense = torch.eye(16) + e.u @ e.v.T + e.s.diag()
    torch.testing.assert_close(e(x), x @ dense.T + e.c, atol=1e-5, rtol=1e-4)


def test_algebra():
    a, b, x = random_edit(1), random_edit(2, diagonal=True), torch.randn(4, 16)
    moved = lambda e: e.displacement(x)  # noqa: E731
    torch.testing.assert_close(moved(a + b), moved(a) + moved(b), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(moved(2.0 * b), 2 * moved(b))
    torch.testing.assert_close(moved(a + -a), torch.zeros(4, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(moved(AffineEdit.shift(a.c)), a.c.expand(4, 16))


def test_edits_compose():
    a, b, x = random_edit(1), random_edit(2, diagonal=True), torch.randn(4, 16)
    for second, first in ((a, b), (b, a), (b, b), (a, a)):
        torch.testing.assert_close((second @ first)(x), second(first(x)), atol=1e-4, rtol=1e-4)
    assert (a @ a).s is None


def test_each_group_of_rows_meets_its_own_edits(model):
    a, b = random_edit(1), random_edit(2)
    groups = [{0: a}, {}, {("mlp_out", 1): b, 0: b}]
    batch = model.encode(PROMPTS)
    with torch.no_grad(), applied(model, groups, positions="all"):
        together = model.forward(model.encode(PROMPTS * 3)).chunk(3)
    for edits, logits in zip(groups, together, strict=True):
        with torch.no_grad(), applied(model, edits, positions="all"):
            torch.testing.assert_close(model.forward(batch), logits, atol=1e-5, rtol=1e-4)
    with applied(model, groups), pytest.raises(ReplibError, match="4 rows do not fall into 3 equal groups"):
        model.forward(model.encode(["w1 w2"] * 4))


def test_ablation_removes_the_direction_and_nothing_else():
    r, x = torch.randn(16), torch.randn(6, 16)
    edit = AffineEdit.ablation(r)
    torch.testing.assert_close(edit(x) @ r, torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(edit(edit(x)), edit(x))
    other = torch.randn(16)
    other -= (other @ r) / (r @ r) * r
    torch.testing.assert_close(edit(x) @ other, x @ other, atol=1e-4, rtol=1e-4)


def test_the_next_block_sees_the_edit(model):
    edit = random_edit()
    before = capture(model, PROMPTS, layers=[1])[1]
    with applied(model, {1: edit}):
        after = capture(model, PROMPTS, site="resid_pre", layers=[2])[2]
    torch.testing.assert_close(after, edit(before), atol=1e-5, rtol=1e-4)


def test_last_prompt_edits_that_token_alone(model):
    batch = model.encode(PROMPTS, ["w8 w9"] * 3)
    seen = {}
    handle = model.blocks[1].register_forward_pre_hook(
        lambda _m, a, k: seen.update(x=(a or (k["hidden_states"],))[0]), with_kwargs=True
    )
    model.forward(batch)
    before = seen["x"]
    for positions, mask in {
        "last_prompt": torch.zeros_like(batch.prompt_mask).scatter(1, batch.last_prompt[:, None], True),
        "prompt": batch.prompt_mask,
        "response": batch.response_mask,
        "all": torch.ones_like(batch.prompt_mask),
    }.items():
        with applied(model, {0: AffineEdit.shift(torch.ones(16))}, positions=positions):
            model.forward(batch)
        torch.testing.assert_close(seen["x"] - before, mask[..., None].expand_as(before).float(), atol=1e-5, rtol=0)
    handle.remove()


def test_generated_tokens_are_edited_only_where_asked(model):
    """Decoding steps see one token at a time; 'last_prompt' must not match each of them."""
    counts, nothing = {}, Counting(torch.zeros(16, 0), torch.zeros(16, 0), torch.zeros(16))
    for positions in ("last_prompt", "prompt", "response", "all"):
        Counting.seen = []
        with applied(model, {1: nothing}, positions=positions):
            model.generate(["w1 w2", "w3 w4"], max_new_tokens=4)
        counts[positions] = Counting.seen
    assert counts["last_prompt"] == [2]
    assert counts["prompt"] == [2 * 5]
    assert set(counts["response"]) == {2} and len(counts["response"]) == 3
    assert counts["all"] == [2 * 5, 2, 2, 2]


def test_padding_and_batching_do_not_change_what_an_edit_does(model):
    with applied(model, {0: random_edit() * 0.1}, positions="last_prompt"):
        together = capture(model, PROMPTS, layers=[2], batch_size=3)
        alone = capture(model, PROMPTS, layers=[2], batch_size=1)
        words = (
            model.generate(PROMPTS, max_new_tokens=5),
            [model.generate([p], max_new_tokens=5)[0] for p in PROMPTS],
        )
    torch.testing.assert_close(together.values, alone.values, atol=1e-5, rtol=1e-4)
    assert words[0] == words[1]


@torch.no_grad()
def test_the_model_is_bit_for_bit_what_it_was(model):
    batch = model.encode(PROMPTS)
    before, weights = model.forward(batch), {k: v.clone() for k, v in model.model.state_dict().items()}
    with applied(model, {0: random_edit(), 2: random_edit(1)}, positions="all"):
        assert not torch.equal(model.forward(batch), before)
        with applied(model, {1: random_edit(2)}, positions="prompt"):
            model.forward(batch)
    assert torch.equal(model.forward(batch), before)
    with pytest.raises(KeyError), applied(model, {0: random_edit()}):
        raise KeyError
    assert torch.equal(model.forward(batch), before)
    assert all(torch.equal(v, weights[k]) for k, v in model.model.state_dict().items())


@torch.no_grad()
def test_strength_zero_changes_no_bit_and_half_goes_half_way(model):
    batch = model.encode(PROMPTS)
    before = model.forward(batch)
    with applied(model, {0: random_edit()}, strength=0.0, positions="all"):
        assert torch.equal(model.forward(batch), before)
    edit, x = random_edit(), capture(model, PROMPTS, layers=[1])[1]
    with applied(model, {1: edit}, strength=0.5):
        half = capture(model, PROMPTS, site="resid_pre", layers=[2])[2]
    torch.testing.assert_close(half, x + 0.5 * edit.displacement(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "olmo2"])
def test_what_a_sublayer_adds_is_edited_where_it_is_added(kind, tmp_path):
    """After its last norm, if it has one: so the same vector arrives in the stream."""
    made, shift = load(tiny.save_model(tmp_path, kind)), torch.linspace(-1, 1, 16)
    before = capture_sites(made, PROMPTS, ("resid_mid", "resid_post"), layers=[1])
    with applied(made, {("attn_out", 1): AffineEdit.shift(shift)}):
        middle = capture(made, PROMPTS, site="resid_mid", layers=[1])[1]
    with applied(made, {("mlp_out", 1): AffineEdit.shift(shift)}):
        after = capture(made, PROMPTS, layers=[1])[1]
    torch.testing.assert_close(middle, before["resid_mid"][1] + shift, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after, before["resid_post"][1] + shift, atol=1e-5, rtol=1e-4)


def test_an_edit_keeps_the_type_of_the_stream():
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    assert random_edit()(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("edits", "options", "reason"),
    [
        ({9: random_edit()}, {}, "Layer 9 is not in"),
        ({0: random_edit(d=8)}, {}, "width 8, but .* has 16"),
        ({("nowhere", 0): random_edit()}, {}, "Unknown site 'nowhere'"),
        ({("resid_mid", 0): random_edit()}, {}, "resid_mid is only read: edit attn_out"),
        ({0: random_edit()}, {"positions": "last"}, "Unknown edit positions 'last'"),
        ({0: random_edit()}, {"strength": 1.5}, r"1.5 is outside \[0, 1\]"),
    ],
)
def test_bad_edits_are_named(model, edits, options, reason):
    with pytest.raises(ReplibError, match=reason), applied(model, edits, **options):
        pass


def test_where_the_prompt_ends_must_be_known(model):
    with (
        pytest.raises(ReplibError, match="model.forward or model.generate"),
        applied(model, {0: random_edit()}),
    ):
        model.model(**model.encode(PROMPTS).inputs())
