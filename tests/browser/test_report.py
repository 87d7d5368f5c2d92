"""The exported report in a real browser, with no kernel and no network."""

from itertools import product

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra `notebooks` is not installed")
from replib.experiments.response_surface import ResponseSurface  # noqa: E402
from replib.figures import layers  # noqa: E402
from replib.figures.report import FIGURE_MIME, export_html  # noqa: E402
from replib.figures.widgets import scrub_layers, scrub_response  # noqa: E402

pytestmark = pytest.mark.browser
LABELS = ["harmful"] * 20 + ["harmless"] * 20


def figure(seed: int, title: str = "") -> go.Figure:
    points = np.random.default_rng(seed).normal(size=(40, 2))
    return layers._scatter(points, LABELS, explained=[0.5, 0.2], title=title)


def shown(data):
    cell = nbformat.v4.new_code_cell("show()", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("display_data", data=data)]
    return cell


def response() -> ResponseSurface:
    grid = pd.DataFrame(product((0.1, 0.4), (0.0, 3.0), (10.0, 100.0)), columns=["alpha", "beta", "gamma"])
    return ResponseSurface.fit(grid.assign(attack=np.linspace(0, 1, 8), harmless=0.5), {"attack": 50, "harmless": 50})


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    numbered = scrub_layers({layer: figure(layer, f"block {layer}") for layer in range(4)}, title="By block")
    named = scrub_layers({"embedding": figure(0, "embedding"), "output": figure(9, "output")})
    cells = [nbformat.v4.new_markdown_cell("# Report")]
    cells += [shown(view._repr_mimebundle_()[0]) for view in (numbered, named, scrub_response(response()))]
    cells += [shown({FIGURE_MIME: figure(5).to_plotly_json()})]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "a.ipynb")
    return export_html([folder / "a.ipynb"], folder / "report.html", title="Report")


@pytest.fixture
def opened(page, report):
    page.goto(report.as_uri())
    yield page
    assert page.requests == [report.as_uri()], "the report must not use the network"
    assert page.errors == []


def test_figures_are_drawn_when_they_come_into_sight(opened):
    figure = opened.locator(".replib-figure")
    figure.scroll_into_view_if_needed()
    figure.locator("path.point").first.wait_for()
    assert figure.locator("path.point").count() == 40


def test_the_slider_moves_the_points_by_keyboard_and_tears_nothing_out(opened, places):
    view = opened.locator(".replib-view").nth(0)
    view.locator("path.point").first.wait_for()
    view.locator(".replib-plot").evaluate("plot => { plot.querySelector('svg').dataset.first = 'yes' }")
    before = places(view)
    view.locator("input[type=range]").focus()
    opened.keyboard.press("ArrowRight")
    opened.wait_for_function("document.querySelector('.replib-plot .gtitle').textContent.startsWith('block 1')")
    assert places(view) != before
    assert view.locator("output").text_content() == "1"
    assert view.locator("input").get_attribute("aria-valuetext") == "block 1"
    assert view.locator("svg[data-first=yes]").count() == 1
    opened.keyboard.press("ArrowLeft")
    opened.wait_for_function("document.querySelector('.replib-plot .gtitle').textContent.startsWith('block 0')")
    assert places(view) == before


def test_interpolated_outcomes_move_with_each_slider_and_name_the_nearest_trained_setting(opened, places):
    view = opened.locator(".replib-view").nth(2)
    view.scroll_into_view_if_needed()
    view.locator("path.point").first.wait_for()
    assert "trained right here: α 0.1, β 0, γ 10" in view.locator(".legend").text_content()
    for slider, nearest in ((0, "nearest trained"), (2, "nearest trained"), (1, "nearest trained")):
        before = places(view)
        view.locator("input[type=range]").nth(slider).fill("1")
        opened.wait_for_timeout(400)
        assert places(view) != before
        assert nearest in view.locator(".legend").text_content()


def test_play_runs_to_the_last_block_and_stops(opened):
    view = opened.locator(".replib-view").nth(0)
    view.get_by_role("button", name="play").click()
    opened.wait_for_function("document.querySelector('.replib-scrub output').textContent === '3'")
    view.get_by_role("button", name="play").wait_for()


def test_the_menu_chooses_a_named_figure(opened):
    view = opened.locator(".replib-view").nth(1)
    view.scroll_into_view_if_needed()
    view.locator("select").select_option(label="output")
    view.locator(".gtitle", has_text="output").wait_for()


def test_code_is_folded_until_asked_for(opened):
    code = opened.locator("details.code pre").first
    assert not code.is_visible()
    opened.get_by_role("button", name="show all code").click()
    assert code.is_visible()


def test_a_narrow_window_cuts_nothing_off(opened):
    opened.set_viewport_size({"width": 700, "height": 900})
    opened.locator(".replib-view path.point").first.wait_for()
    opened.wait_for_timeout(300)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 700
