"""Figures of audits: attacks and benign tasks, edit attacks by block, robustness, localisation, fronts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from replib.ablation.localisation import AT_DEPTH
from replib.core.stats import Measured, numbers, spearman
from replib.experiments.comparison_results import MEASURES, DefenceComparison
from replib.experiments.hardening_results import HardeningResults
from replib.figures.style import AMBER, BLUE, DASHES, GREY, GRID_COLOUR, INK, SYMBOLS, VERMILLION, apply_style, safe
from replib.figures.traces import (
    BENIGN_KINDS,
    band,
    case_note,
    curve_lines,
    join_notes,
    need,
    rate_axis,
    rate_cells,
    whiskers,
)
from replib.figures.training import pareto_front

_COLUMNS = 4
_RATES = {"range": [-0.04, 1.04], "tickformat": ".0%"}
_MODELS = ("#222222", BLUE, VERMILLION, "#009E73", "#CC79A7", AMBER, "#56B4E9", "#8C6BB1", "#4D7C0F")
Panels = Mapping[str, Mapping[str, Measured]]


def audit_success(table: pd.DataFrame) -> go.Figure:
    """Compliance with every attack and benign task and its Wilson interval, a row a task, a panel a model.

    table: columns `model`, `attack`, `kind`, `n`, `compliance`, `low`, `high`, `degenerate`.
    """
    need(table, "audit_success", "rows")
    models, attacks = table["model"].unique(), table["attack"].unique()
    names = [safe(model) for model in models]
    figure = make_subplots(1, len(models), subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.03)
    for column, model in enumerate(models, start=1):
        figure.add_traces([*_audit_points(table[table["model"] == model], legend=column == 1)], rows=1, cols=column)
    figure.update_xaxes(
        range=[-0.06, 1.06], tickvals=[0, 0.5, 1], ticktext=["0", "50", "100"], showgrid=True, gridcolor=GRID_COLOUR
    )
    figure.update_xaxes(title_text="complied (%)")
    order = [safe(attack) for attack in reversed(attacks)]
    figure.update_yaxes(categoryorder="array", categoryarray=order, range=[-0.6, len(attacks) - 0.4], dtick=1)
    note = f"with Wilson 95 % intervals; {case_note([Measured(table['compliance'], n=table['n'])])}"
    return apply_style(figure, "Share of prompts complied with, by attack", note, height=190 + 25 * len(attacks))


def pareto_defences(results: DefenceComparison, against: str = "benign") -> go.Figure:
    """Mean attack success of each defence against a benign rate, with the front."""
    both = (results.measured(rate) for rate in ("attack", against))
    title = f"Defences on the test split: attack success against {MEASURES[against]}"
    figure = pareto_front(*both, names=results.titles, title=title, listed=True)
    return figure.update_xaxes(title_text=MEASURES[against])


def pareto_hardening(results: HardeningResults) -> go.Figure:
    """Success of the best attack of the goal against benign compliance, for hardened and other models."""
    both = results.measured_worst(), results.measured("benign")
    title = "The most successful of all re-fitted edits and prefill, against harmless and borderline answers"
    figure = pareto_front(*both, names=results.titles, title=title, listed=True)
    return figure.update_xaxes(title_text=MEASURES["benign"])


def gap_curves(panels: Panels, *, part: str = "mean") -> go.Figure:
    """Transport gap by block over the within-class variance, a panel a model, with the null of relabelled prompts.

    panels: model -> curve -> [layers], ``low`` and ``high`` those of the null; curves named ``undefended …`` are grey.
    """
    figure = _grid(panels, "gap_curves")
    for place, curves in enumerate(panels.values()):
        for name, curve, colour, dash in _coloured(curves):
            lines = [band(curve, name, AMBER), *curve_lines(_bare(curve), name, colour, dash=dash)]
            _add(figure, lines, place)
    figure.update_yaxes(rangemode="tozero").update_yaxes(title_text="gap / variance", col=1)
    note = f"across: block; {part} part of squared Bures-Wasserstein distance, debiased, over variance; bands: null"
    return _styled_grid(figure, panels, "Transport gap between the classes by block", note)


def attack_curves(panels: Panels, title: str = "Success of the transport edit by block") -> go.Figure:
    """Success of edits by the block that they act on, a panel a model. panels: model -> curve -> [layers]."""
    figure = _grid(panels, "attack_curves")
    for place, curves in enumerate(panels.values()):
        for name, curve, colour, dash in _coloured(curves):
            _add(figure, curve_lines(curve, name, colour, dash=dash), place)
    figure.update_yaxes(**_RATES, tickvals=[0, 0.5, 1]).update_yaxes(title_text="complied", col=1)
    n = case_note(curve for curves in panels.values() for curve in curves.values())
    return _styled_grid(figure, panels, title, f"across: block; bands: 95 % intervals; {n}")


def robustness_curves(curves: Mapping[str, Measured]) -> go.Figure:
    """Share of prompts not flipped at each strength of the edit. curves: model -> [strengths]."""
    figure = _lines(curves, "strength of the edit", "prompts not flipped", shape="hv")
    figure.add_vline(1.0, line={"color": INK, "dash": "dot", "width": 1})
    note = join_notes("above strength 1 the edit overshoots", case_note(curves.values()), "95 % intervals on hovering")
    return apply_style(figure, "Strength of the edit that flips a prompt", note, height=460)


def sample_curves(curves: Mapping[str, Measured]) -> go.Figure:
    """Success by the number of fit prompts in each class. curves: model -> [sizes]."""
    figure = _lines(curves, "fit prompts in each class", "complied")
    sizes = numbers(next(iter(curves.values())).at)
    figure.update_xaxes(type="log", tickvals=sizes, ticktext=[f"{n:.0f}" for n in sizes])
    note = join_notes(case_note(curves.values()), "95 % intervals on hovering")
    return apply_style(figure, "Attack success by the number of fit prompts", note, height=460)


def edit_parts(panels: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Success of an edit, its parts and its nulls, a panel a model. panels: model -> ``TransportAudit.shares``."""
    figure = _grid(panels, "edit_parts")
    for place, table in enumerate(panels.values()):
        measured = Measured(table.value, table.low, table.high, table.n)
        colour = [VERMILLION, *[BLUE] * 2, *[GREY] * (len(table) - 3)]
        names = [safe(name.replace("_", " ")) for name in table.variant]
        points = go.Scatter(x=table.value, y=names, mode="markers", marker={"color": colour, "size": 8},
                            error_x=whiskers(measured, slice(None), GREY), text=measured.words(), showlegend=False,
                            hovertemplate="%{y}: %{text}<extra></extra>", cliponaxis=False)  # fmt: skip
        _add(figure, [points], place)
    figure.update_xaxes(range=[-0.03, 1.03], tickvals=[0, 0.5, 1], ticktext=["0", "50", "100"])
    figure.update_yaxes(autorange="reversed", showgrid=False)
    n = case_note(Measured(table.value, n=table.n) for table in panels.values())
    note = f"per cent; red: the edit, blue: its parts, grey: chance; 95 % intervals; {n}"
    return _styled_grid(figure, panels, "Success of the whole edit, its parts, and edits by chance", note)


def predicted_vs_measured(table: pd.DataFrame) -> go.Figure:
    """Measured success of the edit at each block against two predictions from other models.

    table: columns title, block, seed, success, ``predicted`` (from features) and ``AT_DEPTH`` (from depth).
    """
    need(table, "predicted_vs_measured", "blocks")
    names = "from features of the block", "from other models at that depth"
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.05, subplot_titles=names)
    diagonal = {"color": INK, "dash": "dot", "width": 1}
    for column, guess in enumerate(("predicted", AT_DEPTH), start=1):
        points = [_points(name, style, own, guess) for name, style, own in _by_model(table)]
        figure.add_traces([point.update(showlegend=column == 1) for point in points], rows=1, cols=column)
        figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=diagonal, hoverinfo="skip", showlegend=False,
                           row=1, col=column)  # fmt: skip
    figure.update_xaxes(**_RATES, title_text="predicted")
    figure.update_yaxes(**_RATES).update_yaxes(title_text="measured", col=1)
    truth = table.success.to_numpy(float)
    ranks = ", ".join(f"{spearman(table[g].to_numpy(float), truth):.2f}" for g in ("predicted", AT_DEPTH))
    note = f"each model predicted from the others; Spearman over all {len(table)} blocks {ranks}"
    return apply_style(figure, "Vulnerable blocks predicted without answers of the model", note, height=470)


def token_heatmap(rows: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Success by the tokens of fit and edit, a row a model. rows: model -> ``TransportAudit.tokens``."""
    need(rows, "token_heatmap", "models")
    kinds = list(next(iter(rows.values())).kind)
    measured = [Measured(t.value, t.low, t.high, t.n) for t in rows.values()]
    value = np.array([numbers(m.value) for m in measured])
    x, y, words = [safe(kind) for kind in kinds], [safe(name) for name in rows], np.array([m.words() for m in measured])
    figure = go.Figure(rate_cells(value, x=x, y=y, words=words, hover="%{y}, %{x}<br>complied %{customdata}"))
    figure.update_layout(coloraxis=rate_axis("complied"))
    figure.update_xaxes(tickangle=-40, ticks="").update_yaxes(autorange="reversed", showgrid=False, ticks="")
    note = f"per cent; fitted at the prompt's end, on the answer, or both; {case_note(measured)}"
    return apply_style(figure, "Success by the tokens of the edit", note, height=240 + 30 * len(rows))


def localisation_errors(table: pd.DataFrame) -> go.Figure:
    """Distance in blocks of each method's guess from the planted blocks. table: ``localisation_error_table``."""
    need(table, "localisation_errors", "models")
    figure, methods = go.Figure(), list(table.method.unique())
    for (model, own), symbol in zip(table.groupby("model", sort=False), cycle(SYMBOLS), strict=False):
        first, last = own["first"].iloc[0], own["last"].iloc[0]
        hover = [f"guess block {b:.0f}" for b in own.found]
        figure.add_scatter(x=own.error, y=own.method, mode="markers", name=f"blocks {first} and {last}", text=hover,
                           marker={"symbol": symbol, "size": 11, "opacity": 0.75}, cliponaxis=False,
                           hovertemplate=f"{safe(model)}, %{{y}}: %{{text}}, %{{x}} off<extra></extra>")  # fmt: skip
    figure.add_vline(0, line={"color": INK, "width": 1})
    figure.update_xaxes(title_text="blocks from the nearest planted one", dtick=1, showgrid=True)
    figure.update_yaxes(categoryorder="array", categoryarray=methods[::-1])
    lost = table.found.isna().groupby(table.method).sum()
    note = join_notes(*(f"{name}: no guess for {n}" for name, n in lost.items() if n)) or "one model each"
    return apply_style(figure, "Distance of each guess from the planted blocks", note, height=180 + 34 * len(methods))


def _audit_points(rows: pd.DataFrame, *, legend: bool) -> Iterator[go.Scatter]:
    """Yield attack points, benign points and the share of degenerate answers of one model."""
    benign = rows["kind"].isin(BENIGN_KINDS)
    sides = (
        ("attack (low is safe)", VERMILLION, rows[~benign]),
        ("benign (high is useful)", BLUE, rows[benign]),
    )
    for name, colour, side in sides:
        measured = Measured(side["compliance"], side["low"], side["high"], side["n"])
        yield _row_points(side, measured, name, legend=legend).update(
            marker={"color": colour, "size": 9}, error_x=whiskers(measured, slice(None), colour)
        )
    broken = rows[rows["degenerate"] > 0]
    measured = Measured(broken["degenerate"], n=broken["n"])
    yield _row_points(broken, measured, "degenerate answers", legend=legend).update(
        marker={"color": INK, "size": 7, "symbol": "x-thin", "line": {"width": 1.5}}
    )


def _row_points(rows: pd.DataFrame, measured: Measured, name: str, *, legend: bool) -> go.Scatter:
    return go.Scatter(
        x=numbers(measured.value),
        y=[safe(attack) for attack in rows["attack"]],
        mode="markers",
        name=name,
        legendgroup=name,
        showlegend=legend,
        text=measured.words(),
        hovertemplate=f"%{{y}}<br>{name}: %{{text}}<extra></extra>",
    )


def _grid(panels: Mapping[str, object], figure: str) -> go.Figure:
    need(panels, figure, "models")
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    names = [safe(name) for name in panels]
    return make_subplots(rows, columns, shared_yaxes="all", subplot_titles=names, horizontal_spacing=0.03,
                         vertical_spacing=0.45 / (rows + 1))  # fmt: skip


def _add(figure: go.Figure, traces: Sequence[go.Scatter], place: int) -> None:
    for trace in traces:
        trace.update(showlegend=place == 0 and bool(trace.showlegend))
        figure.add_trace(trace, row=place // _COLUMNS + 1, col=place % _COLUMNS + 1)


def _styled_grid(figure: go.Figure, panels: Mapping[str, object], title: str, note: str) -> go.Figure:
    return apply_style(figure, title, note, height=150 + 205 * -(-len(panels) // _COLUMNS))


def _coloured(curves: Mapping[str, Measured]) -> list[tuple[str, Measured, str, str]]:
    """Curves with colour and dash; those of the undefended model are grey."""
    own, compared = cycle((colour, DASHES[0]) for colour in (VERMILLION, BLUE, *_MODELS[3:])), (GREY, DASHES[1])
    grey = ("undefended", "transferred")
    return [(name, curve, *(compared if name.startswith(grey) else next(own))) for name, curve in curves.items()]


def _bare(curve: Measured) -> Measured:
    return Measured(curve.value, n=curve.n, at=curve.at)


def _by_model(table: pd.DataFrame) -> list[tuple[str, tuple[str, str], pd.DataFrame]]:
    styles = zip(cycle(_MODELS), cycle(SYMBOLS), strict=False)
    return [(name, style, own) for (name, own), style in zip(table.groupby("title", sort=False), styles, strict=False)]


def _points(name: str, style: tuple[str, str], own: pd.DataFrame, guess: str) -> go.Scatter:
    colour, symbol = style
    return go.Scatter(
        x=own[guess],
        y=own.success,
        mode="markers",
        name=safe(name),
        legendgroup=name,
        marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.7},
        text=[f"{safe(name)}, seed {r.seed}, block {r.block}" for r in own.itertuples()],
        hovertemplate="%{text}<br>predicted %{x:.0%}, measured %{y:.0%}<extra></extra>",
    )


def _lines(curves: Mapping[str, Measured], x: str, y: str, *, shape: str = "linear") -> go.Figure:
    """Rates over numbers, a line a model, with intervals on hovering."""
    need(curves, y, "models")
    figure = go.Figure()
    for (name, curve), colour, number in zip(curves.items(), cycle(_MODELS), range(99), strict=False):
        dash = DASHES[number // len(_MODELS) % len(DASHES)]
        (line,) = curve_lines(curve, name, colour, dash=dash, axis=x, banded=False)
        figure.add_trace(line.update(line_shape=shape))
    figure.update_xaxes(title_text=x).update_yaxes(**_RATES, title_text=y)
    return figure
