"""Methods that fit an edit: each against its formula said again in other words, and what must not be possible."""

import numpy as np
import ot
import pytest
import torch

from replib.core.errors import ReplibError
from replib.edits.methods import METHODS, ace, act, fit_edit, full_ot, gaussian_act, leace, linear_act, mean_act
from replib.transport.affine import AffineEdit

FITTED = [name for name, method in METHODS.items() if not method.selected]


@pytest.fixture(scope="module")
def clouds():
    torch.manual_seed(0)
    return torch.randn(40, 16) @ torch.randn(16, 16), torch.randn(30, 16) + 2


def wide(seed=0, n=20, d=50):
    """Fewer samples than coordinates, as with real activations."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g).double() + 1, torch.randn(n + 4, d, generator=g).double()


# --------------------------------------------------------------------------------------------- transport
def test_pca_ot_gives_the_target_mean_and_covariance_in_its_subspace(clouds):
    harmful, harmless = clouds
    edit = fit_edit("pca_ot", harmful, harmless, 0, k=3)[("resid_post", 0)]
    basis = torch.linalg.qr(edit.v.float())[0]
    moved, target = edit(harmful) @ basis, harmless @ basis
    torch.testing.assert_close(moved.mean(0), target.mean(0), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(moved.T.cov(), target.T.cov(), atol=2e-3, rtol=2e-3)
    outside = torch.eye(16) - basis @ basis.T
    torch.testing.assert_close(edit(harmful) @ outside, harmful @ outside, atol=1e-4, rtol=1e-4)


def test_full_transport_is_that_of_the_ridged_covariances():
    """POT builds the d x d map from them; ours has the rank of the samples' span and is the identity off it."""
    x, y = wide()
    edit = full_ot(x, y, 0)
    ridge = full_ridge(x, y) * np.eye(50)
    scale, _ = ot.gaussian.bures_wasserstein_mapping(
        x.mean(0).numpy(), y.mean(0).numpy(), np.cov(x.T.numpy()) + ridge, np.cov(y.T.numpy()) + ridge
    )
    torch.testing.assert_close(
        edit.u.double() @ edit.v.double().T + torch.eye(50), torch.from_numpy(scale), atol=1e-4, rtol=1e-3
    )
    torch.testing.assert_close(edit(x.float()).mean(0), y.mean(0).float(), atol=1e-4, rtol=1e-3)


def full_ridge(x, y):
    """The mean variance of an axis of the pooled span."""
    rank = torch.linalg.matrix_rank(torch.cat([x, y]) - torch.cat([x, y]).mean(0))
    return float((x.var(0).sum() + y.var(0).sum()) / (2 * rank))


# --------------------------------------------------------------------------------------------- one direction
def test_actadd_moves_one_mean_onto_the_other_and_its_negative_moves_back(clouds):
    harmful, harmless = clouds
    edit = fit_edit("actadd", harmful, harmless, 4)[("resid_post", 4)]
    torch.testing.assert_close(edit(harmful).mean(0), harmless.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close((-edit)(harmless).mean(0), harmful.mean(0), atol=1e-5, rtol=1e-4)


def test_rfa_removes_the_mean_gap_everywhere_it_could_be_written(clouds):
    harmful, harmless = clouds
    edits = fit_edit("rfa", harmful, harmless, 1, depth=3)
    assert set(edits) == {(s, i) for s in ("resid_pre", "attn_out", "mlp_out") for i in range(3)}
    gap = harmful.mean(0) - harmless.mean(0)
    torch.testing.assert_close(edits[("mlp_out", 2)](harmful) @ gap, torch.zeros(40), atol=1e-3, rtol=0)


def test_affine_ablation_gives_all_the_harmless_mean_along_the_direction(clouds):
    harmful, harmless = (x.double() for x in clouds)
    edit, gap = ace(harmful, harmless, 0), (harmful.mean(0) - harmless.mean(0)).float()
    along = edit(torch.cat([harmful, harmless]).float()) @ gap
    torch.testing.assert_close(along, (harmless.mean(0).float() @ gap).expand(70), atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(edit(harmless.mean(0).float()), harmless.mean(0).float(), atol=1e-4, rtol=1e-4)


def literal_leace(x, y, *, shrink):
    """Belrose et al., theorem 4.3, word by word: whiten, project out what varies with the label, unwhiten.

    Their own package (concept-erasure 0.2.4) gives the same to 1.3e-6, with and without shrinkage, n and d to 400.
    """
    rows, label = torch.cat([x, y]), torch.cat([torch.ones(len(x)), torch.zeros(len(y))]).double()
    n, d = rows.shape
    centred = rows - rows.mean(0)
    sigma, cross = centred.T @ centred / n, centred.T @ (label - label.mean())
    if shrink:
        target = sigma.trace() / d * torch.eye(d).double()
        top = sigma.trace() ** 2 * target.square().sum() / n
        bottom = sigma.square().sum() * target.square().sum() - (sigma @ target).trace() ** 2
        weight = max(0.0, float(1 - top / bottom))
        sigma = weight * sigma + (1 - weight) * target
    values, vectors = torch.linalg.eigh(sigma)
    values = torch.where(values > 1e-10 * values[-1], values, torch.inf)
    whiten = vectors / values.sqrt() @ vectors.T
    unwhiten = vectors * torch.where(values.isinf(), 0.0, values).sqrt() @ vectors.T
    u = whiten @ cross / (whiten @ cross).norm()
    return lambda z: z - (z - rows.mean(0)) @ (unwhiten @ torch.outer(u, u) @ whiten).T


@pytest.mark.parametrize("shrink", [True, False])
@pytest.mark.parametrize("d", [8, 50])
def test_leace_is_the_published_formula(shrink, d):
    x, y = wide(d=d)
    edit = leace(x, y, 0, shrink=shrink)
    torch.testing.assert_close(edit(x.float()), literal_leace(x, y, shrink=shrink)(x).float(), atol=1e-4, rtol=1e-3)


def test_after_leace_the_classes_have_one_mean_and_erasing_again_changes_nothing():
    x, y = wide(d=8)
    edit = leace(x, y, 0)
    a, b = edit(x.float()), edit(y.float())
    torch.testing.assert_close(a.mean(0), b.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(edit(a), a, atol=1e-5, rtol=1e-4)
    rows = torch.cat([x, y]).float()
    torch.testing.assert_close(edit(rows).mean(0), rows.mean(0), atol=1e-5, rtol=1e-4)


def test_leace_moves_less_than_any_other_edit_of_its_kind():
    """Of all edits that erase the gap, measured in the metric of the covariance (theorem 4.3)."""
    x, y = wide(d=8)
    rows = torch.cat([x, y])
    inverse = torch.linalg.inv((rows - rows.mean(0)).T @ (rows - rows.mean(0)) / len(rows))
    moved = lambda z: ((z - rows) @ inverse * (z - rows)).sum(1).mean()  # noqa: E731
    best, gap = literal_leace(x, y, shrink=False), x.mean(0) - y.mean(0)
    assert moved(leace(x, y, 0, shrink=False)(rows.float()).double()) == pytest.approx(
        float(moved(best(rows))), rel=1e-4
    )
    for seed in range(20):
        v = torch.randn(8, generator=torch.Generator().manual_seed(seed)).double()
        other = rows - (rows - rows.mean(0)) @ torch.outer(v / (v @ gap), gap)
        assert moved(best(rows)) <= moved(other) + 1e-9


# --------------------------------------------------------------------------------------------- a line a coordinate
def test_act_is_least_squares_between_sorted_samples(clouds):
    a, b = clouds[0][:30].double().numpy(), clouds[1].double().numpy()
    edit = act(*map(torch.from_numpy, (a, b)), 0)
    for j in range(16):
        slope, bias = np.polyfit(np.sort(a[:, j]), np.sort(b[:, j]), 1)
        assert 1 + edit.s[j].item() == pytest.approx(slope, rel=1e-4)
        assert edit.c[j].item() == pytest.approx(bias, abs=1e-4)


def test_act_meets_unequal_numbers_on_their_quantiles():
    """Samples that are spread evenly have the same quantiles at any number: the line between them is exact."""
    even = lambda n, low, high: torch.linspace(low, high, n, dtype=torch.float64)[:, None]  # noqa: E731
    for n, m in ((40, 30), (30, 40)):
        edit = act(even(n, 0, 1).flip(0), even(m, 2, 8), 0)
        assert (1 + edit.s.item(), edit.c.item()) == pytest.approx((6, 2), rel=1e-6)


def test_act_of_one_coordinate_is_near_exact_transport(clouds):
    """For sorted samples of equal size the optimal coupling pairs ranks; the line is its best affine fit."""
    a, b = clouds[0][:30, :1], clouds[1][:, :1]
    plan = ot.emd([], [], ot.dist(a.double().numpy(), b.double().numpy()))
    paired = torch.from_numpy(30 * plan @ b.double().numpy()).float()
    residual = act(a, b, 0)(a) - paired
    assert residual.mean().abs() < 1e-4 and (residual * a).mean().abs() < 1e-3


def test_a_constant_coordinate_is_only_shifted():
    a, b = torch.ones(5, 2), torch.randn(5, 2)
    edit = act(a, b, 0)
    assert not edit.s.any()
    torch.testing.assert_close(edit(a).mean(0), b.mean(0), atol=1e-6, rtol=1e-5)


def test_linear_act_is_act_on_all_that_it_was_fitted_on_and_nothing_beyond(clouds):
    harmful, harmless = (x.double() for x in clouds)
    edit, line, x = linear_act(harmful, harmless, 0), act(harmful, harmless, 0), harmful.float()
    torch.testing.assert_close(edit(x), line(x), atol=1e-5, rtol=1e-5)
    far = 1.01 * x.max(0).values.abs() + x.abs().max(0).values
    assert torch.equal(edit(far), far)
    inner = linear_act(harmful, harmless, 0, support=(0.1, 0.9))
    low, high = (torch.quantile(harmful, q, dim=0).float() for q in (0.1, 0.9))
    inside = (x > low) & (x < high)
    torch.testing.assert_close(inner(x), torch.where(inside, line(x), x), atol=1e-4, rtol=1e-4)


def test_gaussian_act_gives_each_coordinate_the_target_mean_and_deviation(clouds):
    harmful, harmless = (x.double() for x in clouds)
    harmful[:, 3] = 1.0
    edit = gaussian_act(harmful, harmless, 0)
    moved, others = edit(harmful.float()), [j for j in range(16) if j != 3]
    torch.testing.assert_close(moved.mean(0)[others], harmless.float().mean(0)[others], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved.std(0)[others], harmless.float().std(0)[others], atol=1e-4, rtol=1e-4)
    assert torch.equal(moved[:, 3], harmful.float()[:, 3])  # what does not vary is left alone
    torch.testing.assert_close(mean_act(harmful, harmless, 0).c, (harmless.mean(0) - harmful.mean(0)).float())


def test_gaussian_act_is_transport_where_coordinates_do_not_correlate():
    """Then both covariances are diagonal, and the optimal map is one line a coordinate."""
    g = torch.Generator().manual_seed(0)
    signs = torch.tensor([[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)]).repeat(4, 1).double()
    x, y = signs * torch.tensor([2.0, 0.5]) + 1, signs * torch.tensor([1.0, 3.0]) - 2
    z = torch.randn(9, 2, generator=g)
    torch.testing.assert_close(gaussian_act(x, y, 0)(z), METHODS["pca_ot"].fit(x, y, 2)(z), atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------- all of them
@pytest.mark.parametrize("method", FITTED)
def test_order_of_prompts_scale_and_rotation_do_not_matter(clouds, method):
    """The order never; a common scale scales the map; RFA acts as a whole and is tried at one place."""
    harmful, harmless = (x.double() for x in clouds)
    first = lambda *x: next(iter(fit_edit(method, *x, 0, k=2, depth=1).values()))  # noqa: E731
    edit = first(harmful, harmless)
    if method not in ("random_labels", "harmless_split"):  # which draw by place
        again = first(harmful.flip(0), harmless.flip(0))
        torch.testing.assert_close(again(clouds[0]), edit(clouds[0]), atol=1e-3, rtol=1e-3)
    larger = first(8 * harmful, 8 * harmless)
    torch.testing.assert_close(larger(8 * clouds[0]), 8 * edit(clouds[0]), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda a, b: fit_edit("magic", a, b, 0), "Unknown method 'magic'.*pca_ot"),
        (
            lambda a, b: fit_edit("pca_ot", a[:3], b, 0, k=8),
            "3 prompts in a class cannot fit 8 axes; add prompts",
        ),
        (lambda a, b: fit_edit("pca_ot", a[:0], b, 0), "not empty"),
        (lambda a, b: fit_edit("harmless_split", a, b[:3], 0), "3 harmless prompts do not give two halves"),
        (lambda a, b: fit_edit("rfa", a, a, 0, depth=1), "one mean"),
        (lambda a, b: fit_edit("leace", a, a, 0), "one mean"),
    ],
)
def test_bad_fits_are_named(clouds, call, reason):
    with pytest.raises(ReplibError, match=reason):
        call(*clouds)


@pytest.mark.parametrize("method", FITTED)
def test_duplicates_a_constant_coordinate_and_unequal_numbers_are_ordinary(clouds, method):
    harmful, harmless = torch.cat([clouds[0], clouds[0][:12]]), clouds[1].clone()
    harmful[:, 5] = harmless[:, 5] = 7.0
    (edit,) = {id(e): e for e in fit_edit(method, harmful, harmless, 0, k=8, depth=1).values()}.values()
    moved = edit(harmful)
    assert moved.isfinite().all() and not torch.equal(moved, harmful)
    if method != "random_subspace":  # which is drawn in all coordinates
        torch.testing.assert_close(moved[:, 5], harmful[:, 5], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", FITTED)
@pytest.mark.parametrize("bad", [float("nan"), torch.tensor(7e4).half().float().item()])
def test_no_method_is_fitted_on_what_overflowed(clouds, method, bad):
    harmful = clouds[0].clone()
    harmful[3, 5] = bad
    with pytest.raises(ReplibError, match="float16 overflows"):
        fit_edit(method, harmful, clouds[1], 0, depth=1)


# --------------------------------------------------------------------------------------------- controls
def fitted(method, clouds):
    return METHODS[method].fit(*(x.double() for x in clouds), 2)


def test_mean_and_covariance_are_the_whole(clouds):
    x, whole = clouds[0], fitted("pca_ot", clouds)
    mean, spread = fitted("mean_only", clouds), fitted("covariance_only", clouds)
    torch.testing.assert_close((mean + spread).displacement(x), whole.displacement(x), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(spread(x).mean(0), x.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mean(x).T.cov(), x.T.cov(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close((mean @ spread)(x), whole(x), atol=1e-3, rtol=1e-3)


def test_a_random_subspace_has_the_energy_and_the_rank_and_not_the_direction(clouds):
    x, whole, turned = clouds[0], fitted("pca_ot", clouds), fitted("random_subspace", clouds)
    energy = lambda edit: edit.displacement(x).square().sum(1).mean()  # noqa: E731
    torch.testing.assert_close(energy(turned), energy(whole), atol=0, rtol=1e-3)
    rank = lambda edit: int(torch.linalg.matrix_rank(edit.u.double() @ edit.v.double().T, rtol=1e-4))  # noqa: E731
    assert rank(turned) == rank(whole) == 2
    basis = lambda edit: torch.linalg.qr(edit.v.double())[0]  # noqa: E731
    assert (basis(whole).T @ basis(turned)).square().sum() < 1.5


def test_labels_by_lot_and_halves_of_one_class_move_means_far_less(clouds):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 16, generator=g) + 3, torch.randn(60, 16, generator=g)
    shift = lambda name: fitted(name, (x, y)).displacement(x.mean(0)).norm()  # noqa: E731
    assert shift("random_labels") < 0.4 * shift("pca_ot")
    halves = METHODS["harmless_split"].fit(x.double(), y.double(), 2)
    assert halves.displacement(y.mean(0)).norm() < 0.2 * shift("pca_ot")
    other = METHODS["harmless_split"].fit(x.double() + 5, y.double(), 2)
    assert torch.equal(other.c, halves.c)  # the harmful are not looked at


def test_a_control_of_an_edit_of_all_coordinates_is_refused(clouds):
    from replib.edits.controls import random_subspace

    with pytest.raises(ReplibError, match="no subspace"):
        random_subspace(act)(*(x.double() for x in clouds), 2)
    assert isinstance(fitted("mean_only", clouds), AffineEdit)
