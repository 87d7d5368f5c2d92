"""Figures carry their numbers, share one style, and accept every result that a run can produce."""

import base64

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from replib.analysis.logit_lens import LensComparison, LensTrajectory
from replib.core.errors import ReplibError
from replib.core.stats import Measured
from replib.figures import audit_success, layers, lens_heatmap, sweeps, training
from replib.figures.style import COLOURS, FIGURE_TEMPLATE, VERMILLION

RNG = np.random.default_rng(0)
LABELS = ["harmful"] * 5 + ["harmless"] * 4
POINTS = RNG.normal(size=(9, 2))
RATES = RNG.uniform(size=(12, 3))
TOKENS = [["sure", " I", "<|eot|>"], ["\n", "supercalifragilistic", "no"]]
ENTROPY = np.array([[0.1, 2.0, 3.0], [1.0, 4.0, 0.5]])


def lens(entropy, words, inputs="abc", layers=None):
    """Lens reading with these words; fields that no figure shows are zero."""
    layers, entropy = tuple(range(len(words)) if layers is None else layers), torch.as_tensor(entropy)
    top, zero = tuple(tuple((word,) for word in row) for row in words), torch.zeros_like(entropy)
    return LensTrajectory(tuple(inputs), layers, entropy, top, zero[..., None], zero, zero.long(), {})


def audit_table() -> pd.DataFrame:
    rows = [
        ("base", "direct", "attack", 216, 0.03, 0.01, 0.06, 0.0),
        ("base", "harmless", "harmless", 384, 0.99, 0.97, 1.0, 0.0),
        ("bent", "direct", "attack", 216, 0.0, 0.0, 0.02, 0.01),
        ("bent", "harmless", "harmless", 384, 0.98, 0.96, 0.99, 0.0),
    ]
    names = ["model", "attack", "kind", "n", "compliance", "low", "high", "degenerate"]
    return pd.DataFrame(rows, columns=names)


def every_figure() -> dict[str, go.Figure]:
    rates = Measured(RATES, RATES - 0.1, RATES + 0.1, n=96)
    curve = Measured(RATES[:, 0], RATES[:, 0] - 0.1, RATES[:, 0] + 0.1, n=96)
    point = Measured([0.5, 0.1], [0.4, 0.0], [0.6, 0.2], n=216)
    pair = {"labels": LABELS, "explained": [[0.5, 0.2], [0.9, 0.1]]}
    reading = lens(ENTROPY, TOKENS)
    probe = np.where(np.arange(12) % 5 == 0, RATES[:, 1], np.nan)
    panels = {"loss": {"safe": RATES[:, 0]}, "rate": {"attack success": probe}}
    return {
        "clusters": layers._scatter(POINTS, LABELS, explained=[0.5, 0.2]),
        "clusters_pair": layers._scatter_pair(POINTS, 9 * POINTS, **pair),
        "clusters_grid": layers._scatter_grid({0: POINTS, 5: POINTS, "output": POINTS}, LABELS),
        "layer_curves": layers.layer_curves({"base": curve}, "rate", "t", null=curve, marks={"here": 3}),
        "lens_heatmap": lens_heatmap(reading),
        "lens_pair": lens_heatmap(LensComparison(reading, reading, torch.zeros(2, 3))),
        "sweep_heatmap": sweeps._heatmap({"base": rates, "bent": rates}, [1, 2, 4], title="t"),
        "training_curves": training._step_panels(panels, steps=range(12), chosen=5),
        "audit_dots": audit_success(audit_table()),
        "tradeoff": sweeps._tradeoff(point, point, names=["base", "bent"], unit="KL (nats)"),
    }


@pytest.mark.parametrize("name", every_figure())
def test_every_figure_has_the_template_a_title_and_named_axes(name):
    figure = every_figure()[name]
    assert figure.layout.template == go.Figure(layout={"template": FIGURE_TEMPLATE}).layout.template
    assert figure.layout.title.text
    assert figure.layout.height
    shown = [axis for axis in figure.select_xaxes() if axis.showticklabels is not False]
    assert any(axis.title.text for axis in shown) or name == "clusters_grid"


def test_clusters_carry_each_label_in_its_colour():
    harmful, harmless = layers._scatter(POINTS, LABELS, explained=[0.5, 0.2], texts=["<b>?"] * 9).data
    np.testing.assert_allclose(np.c_[harmful.x, harmful.y], POINTS[:5], rtol=1e-6)
    np.testing.assert_allclose(np.c_[harmless.x, harmless.y], POINTS[5:], rtol=1e-6)
    assert (harmful.marker.color, harmless.marker.color) == (COLOURS["harmful"], COLOURS["harmless"])
    assert harmful.text[0] == "&lt;b&gt;?", "a prompt must not open a tag in a hover box"


def test_no_label_is_dropped_when_there_are_many():
    labels = [f"group {place}" for place in range(9)]
    assert sum(len(trace.x) for trace in layers._scatter(POINTS, labels, explained=[0.5, 0.2]).data) == 9


def test_each_model_has_its_own_axes():
    figure = layers._scatter_pair(POINTS, POINTS, labels=LABELS, explained=[[0.5, 0.2], [0.9, 0.1]])
    assert figure.layout.xaxis2.matches is None
    assert "90.0%" in figure.layout.xaxis2.title.text


def test_a_model_keeps_its_colour_and_methods_differ_by_dash():
    curves = {"base": RATES[:, 0], "bent, K = 2": RATES[:, 1], "bent, K = 8": RATES[:, 2]}
    base, two, eight = layers.layer_curves(curves, "rate", "t").data
    assert two.line.color == eight.line.color == COLOURS["bent"]
    assert base.line.color == COLOURS["base"]
    assert two.line.dash != eight.line.dash


def test_curves_carry_values_intervals_and_n():
    curve = Measured([0.1, 0.2], [0.0, 0.1], [0.3, 0.4], n=[96, 80])
    band, line = layers.layer_curves({"base": curve}, "rate", "t").data
    np.testing.assert_allclose(line.y, [0.1, 0.2])
    np.testing.assert_allclose(sorted(band.y), [0.0, 0.1, 0.3, 0.4])
    assert list(line.text) == ["0.1 [0, 0.3], n = 96", "0.2 [0.1, 0.4], n = 80"]


def test_marks_are_drawn_as_lines_and_windows_with_a_legend():
    figure = layers.layer_curves({"base": [0.1, 0.2]}, "rate", "t", marks={"best": 1, "planted": (0.5, 1.5)})
    assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(1, 1), (0.5, 1.5)]
    assert all(shape.showlegend for shape in figure.layout.shapes)


def test_the_window_is_framed_behind_the_curves():
    figure = layers.layer_curves({"base": [0.1, 0.2, 0.3]}, "rate", "t", window=(1, 2))
    (frame,) = figure.layout.shapes
    assert (frame.x0, frame.x1, frame.layer, frame.fillcolor) == (0.5, 2.5, "below", None)
    assert "framed: 40–60 %" in figure.layout.title.text


def test_the_sweep_has_a_fixed_colour_range_blank_cells_and_n_in_hover():
    rates = RATES.copy()
    rates[3, 1] = np.nan
    panel = Measured(rates, rates - 0.1, rates + 0.1, n=96)
    figure = sweeps._heatmap({"base": panel}, [1, 2, 4], title="t")
    (heat,) = figure.data
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    np.testing.assert_allclose(np.array(heat.z), rates.T, rtol=1e-6)
    assert heat.text[1][3] == ""
    assert heat.customdata[0][0].endswith("n = 96")


def test_the_window_is_framed_in_its_own_panel_and_deep_models_stay_readable():
    panels = {"base": np.zeros((12, 3)), "bent": np.zeros((12, 3))}
    figure = sweeps._heatmap(panels, [1, 2, 4], title="t", windows={"bent": (5, 7)})
    (frame,) = figure.layout.shapes
    assert (frame.x0, frame.x1, frame.y0, frame.y1, frame.xref) == (4.5, 7.5, -0.5, 2.5, "x2")
    assert "40–60 %" in figure.layout.title.text and figure.data[0].texttemplate
    deep = sweeps._heatmap({"a": np.zeros((80, 3)), "b": np.zeros((80, 3))}, [1, 2, 4], title="t")
    assert deep.data[0].texttemplate is None and deep.layout.xaxis.dtick == 3
    assert deep.layout.xaxis.domain == deep.layout.xaxis2.domain  # one above the other


def test_the_lens_shortens_tokens_and_keeps_them_whole_in_hover():
    (heat,) = lens_heatmap(lens(ENTROPY, TOKENS)).data
    np.testing.assert_allclose(heat.z, ENTROPY, rtol=1e-6)
    assert heat.text[0][1] == "·I"
    assert heat.text[0][2] == "&lt;|eot|&gt;"
    wide = lens_heatmap(lens(np.ones((1, 19)), [["supercalifragilistic"] * 19], "x" * 19)).data[0]
    assert wide.text[0][0].endswith("…")
    assert wide.customdata[0][0].startswith("supercalifragilistic")


def test_the_lens_names_its_layers():
    chosen = lens_heatmap(lens(ENTROPY, TOKENS, layers=[3, 9]))
    every = lens_heatmap(lens(ENTROPY, TOKENS))
    assert list(chosen.layout.yaxis.ticktext) == ["3", "9"]
    assert list(every.layout.yaxis.ticktext) == ["0", "output"]


def test_a_sparse_probe_is_drawn_as_one_line():
    probe = [1.0, np.nan, np.nan, 0.5]
    (line,) = training._step_panels({"rate": {"attack": probe}}, steps=[0, 5, 10, 15], chosen=15).data
    assert list(line.x) == [0, 15]
    assert list(line.y) == [1.0, 0.5]


def test_audit_dots_split_attack_from_benign_and_keep_the_intervals():
    figure = audit_success(audit_table())
    attack = figure.data[0]
    assert attack.marker.color == VERMILLION
    assert list(attack.y) == ["direct"]
    np.testing.assert_allclose(attack.error_x.array, [0.03], rtol=1e-5)
    np.testing.assert_allclose(attack.error_x.arrayminus, [0.02], rtol=1e-5)
    assert "n = 216" in attack.text[0]
    broken = [trace for trace in figure.data if trace.name == "degenerate answers"]
    assert [len(trace.x) for trace in broken] == [0, 1]


def test_arrays_travel_in_single_precision():
    trace = layers._scatter(POINTS, LABELS, explained=[0.5, 0.2]).to_plotly_json()["data"][0]
    assert trace["x"]["dtype"] == "f4"
    assert len(base64.b64decode(trace["x"]["bdata"])) == 5 * 4


def test_values_that_are_not_finite_draw_a_gap_and_no_crash():
    bad = np.array([[np.nan, 1], [np.inf, 2], [3, 4]])
    assert layers._scatter(bad, ["harmful", "harmless", "safe"], explained=[np.nan, 0.2]).to_json()
    nothing = Measured(np.full(4, np.nan), np.full(4, np.nan), np.full(4, np.nan), n=0)
    assert layers.layer_curves({"base": nothing}, "rate", "t").to_json()
    assert sweeps._heatmap({"base": np.full((4, 2), np.nan)}, [1, 2], title="t").to_json()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: layers._scatter([], [], explained=[0.5, 0.2]),
        lambda: layers._scatter_grid({}, []),
        lambda: layers.layer_curves({}, "rate", "t"),
        lambda: lens_heatmap(lens(np.ones((0, 0)), [], "")),
        lambda: sweeps._heatmap({}, [1], title="t"),
        lambda: training._step_panels({}, steps=[]),
        lambda: audit_success(audit_table()[:0]),
        lambda: sweeps._tradeoff(Measured([]), Measured([]), names=[], unit="KL"),
    ],
)
def test_nothing_to_draw_is_said(draw):
    with pytest.raises(ReplibError, match="nothing to draw"):
        draw()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: layers._scatter(POINTS, LABELS[:3], explained=[0.5, 0.2]),
        lambda: sweeps._heatmap({"base": RATES}, [1, 2], title="t"),
        lambda: lens_heatmap(lens(ENTROPY[:1], TOKENS, layers=[0])),
    ],
)
def test_shapes_that_do_not_fit_are_named(draw):
    with pytest.raises(ReplibError, match="Pass"):
        draw()


def test_intervals_of_many_curves_are_read_on_hovering_and_not_drawn_on_each_other():
    curve = Measured([0.5, 0.6], low=[0.4, 0.5], high=[0.6, 0.7], n=9)
    few = layers.layer_curves(dict.fromkeys("abc", curve), "rate", "t")
    many = layers.layer_curves(dict.fromkeys("abcd", curve), "rate", "t")
    assert len(few.data) == 6 and "hovering" not in few.layout.title.text
    assert len(many.data) == 4 and "n = 9 a point; 95 % intervals on hovering" in many.layout.title.text
    assert many.data[0].text[0] == "0.5 [0.4, 0.6], n = 9"


def test_an_edit_has_its_colour_in_every_figure():
    names = ["PCA-OT, all", "RFA, all", "ActAdd, last prompt"]
    lines = layers.layer_curves({name: [0.1, 0.2] for name in names}, "rate", "t")
    points = sweeps._tradeoff(Measured([0.1, 0.5, 0.9]), Measured([0.1, 0.2, 0.3]), names=names[::-1], unit="KL")
    colours = {trace.name: trace.line.color for trace in lines.data}
    assert [trace.marker.color for trace in points.data] == [colours[name] for name in names[::-1]]


def test_points_that_lie_on_each_other_are_told_apart_in_the_legend():
    point, names = Measured([1.0, 0.1, 1.0, 1.0]), ["PCA-OT, all", "b", "PCA-OT, last prompt", "d"]
    figure = sweeps._tradeoff(point, Measured([0.0, 2.0, 0.0, 0.02]), names=names, unit="KL")
    assert [trace.name for trace in figure.data] == names
    assert len({(t.marker.color, t.marker.symbol) for t in figure.data}) == 4
