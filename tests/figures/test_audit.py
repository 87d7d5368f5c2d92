"""Figures of the audit: every model, every number, and nothing that has no data."""

import numpy as np
import pytest

from helpers.examined import LAYERS, SEEDS, examined
from replib.ablation.localisation import localisation_error_table
from replib.core.errors import ReplibError
from replib.figures import audit

FOUND = examined()
NAMES = [*SEEDS]


def titles(figure):
    return {a.text for a in figure.layout.annotations}


def test_a_panel_a_model_with_the_undefended_one_in_each():
    panels = {n: {"prompt": FOUND.gap(n, "prompt"), "undefended prompt": FOUND.gap("aligned", "prompt")} for n in NAMES}
    figure = audit.gap_curves(panels)
    assert titles(figure) >= set(NAMES)
    curves = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(curves) == 2 * len(NAMES) and len(figure.data) == 4 * len(NAMES)  # each with its null
    np.testing.assert_allclose(curves[4].y, FOUND.gap("strong", "prompt").value, rtol=1e-6)
    assert len({trace.line.color for trace in curves[1::2]}) == 1  # what is compared with is grey everywhere


def test_success_of_both_edits_by_block():
    panels = {n: {"re-fitted": FOUND.by_block(n), "transferred": FOUND.by_block(n, "transferred")} for n in NAMES}
    figure = audit.attack_curves(panels)
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [line.name for line in lines] == ["re-fitted", "transferred"] * 3
    np.testing.assert_allclose(lines[0].y, FOUND.by_block("aligned").value, rtol=1e-6)
    assert sum(bool(trace.showlegend) for trace in figure.data) == 2


@pytest.mark.parametrize("kind", ["holding", "samples"])
def test_a_line_a_model_over_strengths_and_over_prompts(kind):
    draw = {"holding": audit.robustness_curves, "samples": audit.sample_curves}[kind]
    curves = {n: getattr(FOUND, kind)(n) for n in NAMES}
    figure = draw(curves)
    assert [line.name for line in figure.data] == NAMES
    for line, curve in zip(figure.data, curves.values(), strict=True):
        np.testing.assert_allclose(line.y, curve.value, rtol=1e-6)
        np.testing.assert_allclose(line.x, curve.at)


def test_the_edit_and_its_nulls():
    tables = {n: FOUND.shares(n) for n in NAMES}
    figure = audit.edit_parts(tables)
    assert [list(points.x) for points in figure.data] == [list(t.value) for t in tables.values()]
    assert list(figure.data[0].y) == ["full", "mean only", "random labels"]
    assert figure.data[2].error_x.array == pytest.approx(tables["strong"].high - tables["strong"].value, abs=1e-6)


def test_measured_against_predicted():
    table, _ = FOUND.predicted()
    figure = audit.predicted_vs_measured(table)
    points = [trace for trace in figure.data if trace.mode == "markers"]
    assert sum(len(trace.x) for trace in points) == 2 * len(table) == 2 * LAYERS * sum(SEEDS.values())
    assert "Spearman" in figure.layout.title.text


def test_a_row_a_model_a_column_a_token():
    figure = audit.token_heatmap({n: FOUND.tokens(n) for n in NAMES})
    (cells,) = figure.data
    assert list(cells.y) == NAMES and list(cells.x) == list(FOUND.tokens("aligned").kind)
    np.testing.assert_allclose(cells.z[2], FOUND.tokens("strong").value, rtol=1e-6)


def test_errors_in_blocks_and_methods_without_a_guess():
    table = localisation_error_table(
        {"a": {"one": 4, "two": None}, "b": {"one": 8, "two": 7}}, {"a": (5, 6), "b": (7, 8)}
    )
    figure = audit.localisation_errors(table)
    assert [list(trace.x)[0] for trace in figure.data] == [-1, 0]
    assert "two: no guess for 1" in figure.layout.title.text


@pytest.mark.parametrize("draw", ["gap_curves", "attack_curves", "robustness_curves", "edit_parts", "token_heatmap"])
def test_nothing_is_not_drawn(draw):
    with pytest.raises(ReplibError, match="there is nothing to draw"):
        getattr(audit, draw)({})
