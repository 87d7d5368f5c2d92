"""Interpolation keeps to trained settings, knows its left-out errors, and refuses what lies outside."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from replib.core.errors import ReplibError
from replib.core.stats import Measured
from replib.experiments.coefficients import Setting, design
from replib.experiments.response_surface import (
    COEFFICIENTS,
    RATES,
    CoefficientSweep,
    ResponseSurface,
    Scale,
    empirical_logit,
    variance_shares,
)
from replib.figures import training
from replib.figures.response import ResponseView
from replib.figures.training import pareto_front

N = dict.fromkeys(RATES, 48) | {"attack": 192}
GRID = {"alpha": (0.0, 0.1, 0.4), "beta": (0.0, 3.0, 30.0), "gamma": (10.0, 100.0)}


def outcomes(setting: Setting, rng: np.random.Generator, share: float = 1.0) -> dict[str, float]:
    """Smooth rates over coefficients, counted on N answers."""
    push = share * (np.log1p(setting.beta) + 2 * setting.alpha)
    logits = dict.fromkeys(RATES, 3 - push / np.log(10 + setting.gamma)) | {"attack": 1 - push}
    return {name: rng.binomial(N[name], expit(x)) / N[name] for name, x in logits.items()}


@pytest.fixture(scope="module")
def surface():
    rng, settings = np.random.default_rng(0), []
    for s in design():
        steps = [0, s.steps // 2, s.steps]
        rows = [{"step": step, **outcomes(s, rng, step / s.steps), "degenerate": 0.0} for step in steps]
        settings.append(asdict(s) | {"step": s.steps // 2, "rows": rows})
    return CoefficientSweep.of(settings, N, {"preset": asdict(Setting()), "schedule": "linear"})


@pytest.fixture(scope="module")
def response(surface):
    return ResponseSurface.of(surface, "last")


def test_a_surface_gives_the_kept_or_the_last_step(surface):
    assert (surface.at("kept").step * 2 == surface.at("last").step).all()
    assert len(surface.at("last")) == len(design())
    with pytest.raises(ReplibError, match="kept or last"):
        surface.at("best")


def test_only_settings_that_differ_in_their_coefficients_are_interpolated(surface, response):
    expected = {(s.alpha, s.beta, s.gamma) for s in design() if s == Setting(s.alpha, s.beta, s.gamma)}
    assert {tuple(point) for point in response.points} == expected


def test_the_scale_has_a_place_for_zero_and_comes_back():
    scale = Scale.of(np.array([[0.0, 3.0, 10.0], [0.1, 0.0, 100.0]]))
    points = np.array([[0.0, 0.3, 20.0], [0.4, 30.0, 1e3]])
    np.testing.assert_allclose(scale.back(scale(points)), points)
    assert scale(np.zeros(3)).tolist() == [0, 0, 0]


def test_the_empirical_logit_is_finite_at_the_ends_and_antisymmetric():
    z, noise = empirical_logit(np.array([0.0, 0.25, 0.5, 0.75, 1.0]), 20)
    np.testing.assert_allclose(z, -z[::-1])
    np.testing.assert_allclose(noise, noise[::-1])
    assert np.isfinite(z).all()


def test_it_keeps_to_trained_points_within_their_noise(response):
    inside = ((response.points >= response.box[:, 0]) & (response.points <= response.box[:, 1])).all(axis=1)
    for name, found in response.predict(response.points[inside]).items():
        rates = response.trained[name].to_numpy()[inside]
        low, high = zip(
            *((x - 3.5 * np.sqrt(0.3 / N[name]), x + 3.5 * np.sqrt(0.3 / N[name])) for x in rates), strict=True
        )
        assert ((found.value >= low) & (found.value <= high)).mean() > 0.97
        assert ((found.low <= found.value) & (found.value <= found.high)).all()


def test_left_out_points_are_what_a_process_without_them_predicts(response):
    curve, places = response.curves["attack"], response.scale(response.points)
    kernel, noise = curve.process.kernel_, curve.process.alpha
    for i in (0, 7, 31):
        rest = np.arange(len(places)) != i
        among = kernel(places[rest]) + np.diag(noise[rest])
        to = kernel(places[i : i + 1], places[rest])
        naive = curve.mean + to @ np.linalg.solve(among, curve.logits[rest] - curve.mean)
        np.testing.assert_allclose(curve.left_out()[i], naive[0], rtol=1e-6)
    table = response.left_out()
    gaps = np.abs(expit(curve.left_out()) - response.trained["attack"])
    assert table.loc["attack", "mean"] == pytest.approx(gaps.mean()) and (table["worst"] >= table["mean"]).all()


@pytest.mark.parametrize("point", [(0.08, 30, 5), (0.5, 30, 100), (0.08, 1e4, 100)])
def test_outside_of_what_was_trained_is_refused(response, point):
    with pytest.raises(ReplibError, match="outside what was trained"):
        response.predict([point])


def test_too_few_and_doubled_settings_are_refused(response):
    with pytest.raises(ReplibError, match="too few"):
        ResponseSurface.fit(response.trained[:5], N)
    with pytest.raises(ReplibError, match="same coefficients"):
        ResponseSurface.fit(pd.concat([response.trained, response.trained[:1]]), N)


def test_variance_shares_of_a_sum_add_up_and_of_a_product_do_not():
    a, b, c = np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-2, 2, 5), np.linspace(-1, 1, 5), indexing="ij")
    shares = variance_shares(a + b)
    np.testing.assert_allclose(shares["alone"], [0.2, 0.8, 0], atol=1e-12)
    np.testing.assert_allclose(shares["total"], shares["alone"], atol=1e-12)
    crossed = variance_shares(a * c)
    np.testing.assert_allclose(crossed["alone"], 0, atol=1e-12)
    np.testing.assert_allclose(crossed["total"], [1, 0, 1], atol=1e-12)
    assert not variance_shares(np.ones((2, 2, 2))).to_numpy().any()


def test_the_sheets_of_the_view_give_its_figure_at_every_place(response):
    view = ResponseView(response)
    axes = [len(axis) for axis in view.axes]
    at = (axes[0] - 1, 2, 1)
    figure = view.figure(at)
    parts = view.outcomes(at) | view.maps(at[2]) | view.cross(*at[:2])
    for number, part in parts.items():
        trace = figure.data[int(number)]
        if "x" in part:
            np.testing.assert_allclose(np.asarray(trace.x, float), part["x"])
    assert set(parts) == {str(i) for i in range(8)} == {str(i) for i in range(len(figure.data))}
    assert (
        "trained right here" in view.figure().data[1].name
        and "error where a setting is left out" in figure.layout.title.text
    )
    for axis, name in zip(view.axes, COEFFICIENTS, strict=True):
        trained = response.trained[name].unique()
        ends = response.box[COEFFICIENTS.index(name)]
        assert {x for x in trained if ends[0] <= x <= ends[1]} <= set(axis)


def test_the_sensitivity_figures_draw_what_was_trained(surface, response):
    figure = training.coefficient_sweeps(surface)
    line = next(t for t in figure.data if t.name == "attack" and t.mode == "lines+markers")
    rows = surface.like_preset(surface.at("last"), "alpha").sort_values("alpha")
    np.testing.assert_allclose(line.y, rows.attack, rtol=1e-6)
    assert [a.text for a in figure.layout.annotations] == ["α", "β", "γ"]
    windows = training.window_sweep(surface)
    assert list(windows.layout.xaxis.ticktext) == ["0-3", "0-11", "4-7", "4-11", "7-11"]
    assert all(list(t.x) == sorted(t.x) and t.mode == "markers" for t in windows.data)  # between names there is nothing
    assert len(training.step_sweep(surface).layout.annotations) == 3
    assert training.pareto_settings(surface).data and training.coefficient_importance(response).data


def test_the_front_is_drawn_through_its_points():
    success = Measured([0.5, 0.1, 0.3, 0.0], low=[0.4, 0, 0.2, 0], high=[0.6, 0.2, 0.4, 0.1], n=48)
    figure = pareto_front(success, Measured([1.0, 0.9, 0.8, 0.5]), names=["a", "b", "c", "<d>"])
    assert list(figure.data[0].x) == pytest.approx([0.5, 0.9, 1.0])
    assert list(figure.data[1].text) == ["c"] and list(figure.data[2].text) == ["a", "b", "&lt;d&gt;"]
    with pytest.raises(ReplibError, match="one name a point"):
        pareto_front(success, Measured([1.0] * 4), names=["a"])


def test_shares_are_drawn_alone_and_with_others():
    table = pd.DataFrame({"alone": [0.2, 0.5], "total": [0.3, 0.6]}, index=["alpha", "beta"])
    figure = training._importance({"attack": table}, estimator="by hand")
    np.testing.assert_allclose(figure.data[1].x, [0.1, 0.1])
