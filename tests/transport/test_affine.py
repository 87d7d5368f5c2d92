"""Edits as maps: each is its formula, and sums, multiples and chains of edits are edits."""

import pytest
import torch

from helpers.steered import random_edit
from replib.core.errors import ReplibError
from replib.transport.affine import AffineEdit, Origin, SupportedEdit


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


def test_ablation_removes_the_direction_and_nothing_else():
    r, x = torch.randn(16), torch.randn(6, 16)
    edit = AffineEdit.ablation(r)
    torch.testing.assert_close(edit(x) @ r, torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(edit(edit(x)), edit(x))
    other = torch.randn(16)
    other -= (other @ r) / (r @ r) * r
    torch.testing.assert_close(edit(x) @ other, x @ other, atol=1e-4, rtol=1e-4)


def test_an_edit_keeps_the_type_of_the_stream():
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    assert random_edit()(x).dtype == torch.bfloat16


def test_a_chain_of_edits_is_one_edit():
    x = torch.randn(4, 16)
    for a, b in [(random_edit(1), random_edit(2)), (random_edit(1, diagonal=True), random_edit(2))]:
        for first, then in [(a, b), (b, a), (a, a)]:
            torch.testing.assert_close((then @ first)(x), then(first(x)), atol=1e-3, rtol=1e-3)


def test_a_map_in_float64_is_combined_with_one_in_float32():
    a, b, x = random_edit(1), random_edit(2, diagonal=True), torch.randn(4, 16)
    finer = AffineEdit(*(t.double() for t in (b.u, b.v, b.c, b.s)))
    for found, expected in [(a + finer, a + b), (finer @ a, b @ a), (a @ finer, a @ b)]:
        assert found.u.dtype == found.c.dtype == torch.float64
        torch.testing.assert_close(found(x), expected(x), atol=1e-3, rtol=1e-3)


def test_edits_make_a_vector_space_and_their_chains_are_associative():
    a, b, c = (random_edit(i, r=i) for i in (1, 2, 3))
    x = 0.1 * torch.randn(4, 16)
    near = lambda one, other: torch.testing.assert_close(one(x), other(x), atol=1e-2, rtol=1e-3)  # noqa: E731
    near(a + b, b + a)
    near(a + (b + c), (a + b) + c)
    near(2 * (a + b), 2 * a + 2 * b)
    near(c @ (b @ a), (c @ b) @ a)
    near(a @ AffineEdit.shift(torch.zeros(16)), a)


@pytest.mark.parametrize("combine", [lambda a, b: a + b, lambda a, b: a @ b])
def test_edits_that_do_not_belong_together_are_not_combined(combine):
    here, there = Origin("model", "resid_post", 1), Origin("model", "resid_post", 2)
    a, b = random_edit(1).bound(here), random_edit(2)
    assert combine(a, b).origin == combine(b, a).origin == combine(a, a).origin == here
    with pytest.raises(ReplibError, match="two places.*block 1.*block 2"):
        combine(a, b.bound(there))
    with pytest.raises(ReplibError, match="two places"):
        combine(a, b.bound(Origin("another", "resid_post", 1)))
    with pytest.raises(ReplibError, match="widths 16 and 8"):
        combine(a, random_edit(d=8))
    gated = SupportedEdit(random_edit(1), torch.zeros(16), torch.ones(16))
    for pair in [(a, gated), (gated, a)]:
        with pytest.raises(ReplibError, match="Only affine edits"):
            combine(*pair)


def test_a_support_leaves_coordinates_outside_it_alone():
    edit = SupportedEdit(AffineEdit.diagonal(torch.ones(3), torch.ones(3)), torch.zeros(3), torch.full((3,), 2.0))
    x = torch.tensor([[-0.5, 0.0, 1.0], [2.0, 2.1, 0.5]])
    assert torch.equal(edit(x), torch.tensor([[-0.5, 1.0, 3.0], [5.0, 2.1, 2.0]]))
    torch.testing.assert_close((0.5 * edit).displacement(x), 0.5 * edit.displacement(x))


def test_float16_that_overflows_is_said():
    x, push = torch.full((2, 16), 6e4, dtype=torch.float16), AffineEdit.shift(torch.full((16,), 1e4))
    with pytest.raises(ReplibError, match="65504.*bfloat16"):
        push(x)
    assert push(x.bfloat16()).isfinite().all()
    assert (-push)(x).dtype == torch.float16


def test_a_direction_of_no_length_is_not_removed():
    with pytest.raises(ReplibError, match="length zero"):
        AffineEdit.ablation(torch.zeros(16))
