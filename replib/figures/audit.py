"""Figures of the audit of defended models: arrays in, ``go.Figure`` out; ``holds.Holds`` gives the arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from replib.ablation.adaptive_attack import EDIT_ATTACKS
from replib.ablation.localisation import AT_DEPTH
from replib.core.stats import Measured, numbers, spearman
from replib.experiments.comparison_results import MEASURES, DefenceComparison, HardeningResults
from replib.figures.layers import layer_lines
from replib.figures.style import (
    AMBER,
    BLUE,
    DASHES,
    GREY,
    GRID,
    INK,
    SYMBOLS,
    VERMILLION,
    apply_style,
    colour_bar,
    safe,
)
from replib.figures.traces import audit_points, band, cases, curve_lines, need, whiskers
from replib.figures.training import pareto_front

COLUMNS = 4
Panels = Mapping[str, Mapping[str, Measured]]
MODELS = ("#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#4D7C0F")


def gap_profiles(panels: Panels, *, part: str = "mean", title: str = "") -> go.Figure:
    """Draw relative transport gaps by block, a panel a model, each curve with the null of relabelled prompts.

    panels: model -> curve -> [layers], ``low`` and ``high`` the null's; a curve named ``undefended …`` is drawn grey.
    """
    figure = _grid(panels, "gap_profiles")
    for place, curves in enumerate(panels.values()):
        for name, curve, colour, dash in _coloured(curves):
            lines = [band(curve, name, AMBER), *curve_lines(_bare(curve), name, colour, dash=dash)]
            _add(figure, lines, place)
    figure.update_yaxes(rangemode="tozero").update_yaxes(title_text="gap / spread", col=1)
    note = f"across: block; {part} part of squared Bures-Wasserstein, debiased, over variance; bands: null"
    return _dressed(figure, panels, title or "How far apart the classes lie, block by block", note)


def success_by_block(panels: Panels, *, title: str = "") -> go.Figure:
    """Draw success of an edit by the block it acts at, a panel a model. panels: model -> curve -> [layers]."""
    figure = _grid(panels, "success_by_block")
    for place, curves in enumerate(panels.values()):
        for name, curve, colour, dash in _coloured(curves):
            _add(figure, curve_lines(curve, name, colour, dash=dash), place)
    figure.update_yaxes(range=[-0.04, 1.04], tickformat=".0%", tickvals=[0, 0.5, 1])
    figure.update_yaxes(title_text="complied", col=1)
    n = cases(curve for curves in panels.values() for curve in curves.values())
    return _dressed(
        figure, panels, title or "Success of the transport edit by block", f"across: block; bands: 95 % intervals; {n}"
    )


def robustness_curves(curves: Mapping[str, Measured], *, title: str = "") -> go.Figure:
    """Draw the share of prompts that still hold at each strength of the edit. curves: model -> [strengths]."""
    figure = _lines(curves, "strength of the edit", "prompts that hold", shape="hv")
    figure.add_vline(1.0, line={"color": INK, "dash": "dot", "width": 1})
    note = "; ".join(["beyond 1 the edit overshoots", cases(curves.values()), "95 % intervals on hovering"])
    return apply_style(figure, title or "How strong an edit must be to flip a prompt", note, height=460)


def sample_curves(curves: Mapping[str, Measured], *, title: str = "") -> go.Figure:
    """Draw success by the number of prompts a class that fit the edit. curves: model -> [sizes]."""
    figure = _lines(curves, "prompts a class that fit the edit", "complied")
    sizes = numbers(next(iter(curves.values())).at)
    figure.update_xaxes(type="log", tickvals=sizes, ticktext=[f"{n:.0f}" for n in sizes])
    note = "; ".join([cases(curves.values()), "95 % intervals on hovering"])
    return apply_style(figure, title or "How many prompts the attack needs", note, height=460)


def shares(panels: Mapping[str, pd.DataFrame], *, title: str = "") -> go.Figure:
    """Draw success of an edit and of its nulls, a panel a model. panels: model -> ``attribution.attributed``."""
    figure = _grid(panels, "shares")
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
    note = f"per cent; red: the edit, blue: its parts, grey: chance; 95 % intervals; {cases(map(_of, panels.values()))}"
    return _dressed(figure, panels, title or "What of the edit does it: mean, covariance, subspace, classes", note)


def predicted_vs_measured(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw measured against predicted success, a point a block, beside what the other models do at that depth.

    table: columns title, block, seed, success, predicted and ``predictor.AT_DEPTH``.
    """
    need(table, "foretold", "blocks")
    names = "from features of the block", "from other models at that depth"
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.05, subplot_titles=names)
    diagonal = {"color": INK, "dash": "dot", "width": 1}
    for column, guess in enumerate(("predicted", AT_DEPTH), start=1):
        points = [_points(name, style, own, guess) for name, style, own in _by_model(table)]
        figure.add_traces([point.update(showlegend=column == 1) for point in points], rows=1, cols=column)
        figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=diagonal, hoverinfo="skip", showlegend=False,
                           row=1, col=column)  # fmt: skip
    figure.update_xaxes(range=[-0.04, 1.04], tickformat=".0%", title_text="predicted")
    figure.update_yaxes(range=[-0.04, 1.04], tickformat=".0%").update_yaxes(title_text="measured", col=1)
    truth = table.success.to_numpy(float)
    ranks = ", ".join(f"{spearman(table[g].to_numpy(float), truth):.2f}" for g in ("predicted", AT_DEPTH))
    note = f"each model predicted from the others; Spearman over all {len(table)} blocks {ranks}"
    return apply_style(figure, title or "Can vulnerable blocks be told without asking the model?", note, height=470)


def token_depths(rows: Mapping[str, pd.DataFrame], *, title: str = "") -> go.Figure:
    """Draw success by where the edit is fitted and acts, a row a model. rows: model -> ``TransportAudit.tokens``."""
    need(rows, "token_depths", "models")
    kinds = list(next(iter(rows.values())).kind)
    measured = [Measured(t.value, t.low, t.high, t.n) for t in rows.values()]
    value = np.array([numbers(m.value) for m in measured])
    figure = go.Figure(
        go.Heatmap(
            z=value, x=[safe(kind) for kind in kinds], y=[safe(name) for name in rows],
            text=[[f"{100 * v:.0f}" for v in row] for row in value], texttemplate="%{text}",
            customdata=[m.words().tolist() for m in measured], xgap=1, ygap=1, coloraxis="coloraxis",
            hovertemplate="%{y}, %{x}<br>complied %{customdata}<extra></extra>",
        )
    )  # fmt: skip
    bar = colour_bar("complied", tickformat=".0%")
    figure.update_layout(coloraxis={"cmin": 0, "cmax": 1, "colorscale": "Oranges", "colorbar": bar})
    figure.update_xaxes(tickangle=-40, ticks="").update_yaxes(autorange="reversed", showgrid=False, ticks="")
    note = f"per cent; fitted at the prompt's end, on the answer, or both; {cases(measured)}"
    return apply_style(figure, title or "How many tokens deep refusal is", note, height=240 + 30 * len(rows))


def localisation_errors(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw how many blocks each method is off where refusal was planted. table: ``localise.errors``."""
    need(table, "place_errors", "models")
    figure, methods = go.Figure(), list(table.method.unique())
    for (model, own), symbol in zip(table.groupby("model", sort=False), cycle(SYMBOLS), strict=False):
        first, last = own["first"].iloc[0], own["last"].iloc[0]
        hover = [f"says block {b:.0f}" for b in own.found]
        figure.add_scatter(x=own.error, y=own.method, mode="markers", name=f"blocks {first} and {last}", text=hover,
                           marker={"symbol": symbol, "size": 11, "opacity": 0.75}, cliponaxis=False,
                           hovertemplate=f"{safe(model)}, %{{y}}: %{{text}}, %{{x}} off<extra></extra>")  # fmt: skip
    figure.add_vline(0, line={"color": INK, "width": 1})
    figure.update_xaxes(title_text="blocks from the nearest planted one", dtick=1, showgrid=True)
    figure.update_yaxes(categoryorder="array", categoryarray=methods[::-1])
    lost = table.found.isna().groupby(table.method).sum()
    note = "; ".join(f"{name} says nothing of {n}" for name, n in lost.items() if n) or "one model each"
    return apply_style(figure, title or "Who finds the place of refusal", note, height=180 + 34 * len(methods))


def _grid(panels: Mapping[str, object], figure: str) -> go.Figure:
    need(panels, figure, "models")
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    names = [safe(name) for name in panels]
    return make_subplots(rows, columns, shared_yaxes="all", subplot_titles=names, horizontal_spacing=0.03,
                         vertical_spacing=0.45 / (rows + 1))  # fmt: skip


def _add(figure: go.Figure, traces: Sequence[go.Scatter], place: int) -> None:
    for trace in traces:
        trace.update(showlegend=place == 0 and bool(trace.showlegend))
        figure.add_trace(trace, row=place // COLUMNS + 1, col=place % COLUMNS + 1)


def _dressed(figure: go.Figure, panels: Mapping[str, object], title: str, note: str) -> go.Figure:
    return apply_style(figure, title, note, height=150 + 205 * -(-len(panels) // COLUMNS))


def _coloured(curves: Mapping[str, Measured]) -> list[tuple[str, Measured, str, str]]:
    """Curves with colour and dash; what is compared with is grey."""
    own, compared = cycle((colour, DASHES[0]) for colour in (VERMILLION, BLUE, *MODELS[3:])), (GREY, DASHES[1])
    grey = ("undefended", "transferred")
    return [(name, curve, *(compared if name.startswith(grey) else next(own))) for name, curve in curves.items()]


def _bare(curve: Measured) -> Measured:
    return Measured(curve.value, n=curve.n, at=curve.at)


def _of(table: pd.DataFrame) -> Measured:
    return Measured(table.value, n=table.n)


def _by_model(table: pd.DataFrame) -> list[tuple[str, tuple[str, str], pd.DataFrame]]:
    styles = zip(cycle(MODELS), cycle(SYMBOLS), strict=False)
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
    """Rates over numbers, a line a model, intervals on hovering."""
    need(curves, y, "models")
    figure = go.Figure()
    for (name, curve), colour, number in zip(curves.items(), cycle(MODELS), range(99), strict=False):
        dash = DASHES[number // len(MODELS) % len(DASHES)]
        (line,) = curve_lines(curve, name, colour, dash=dash, axis=x, banded=False)
        figure.add_trace(line.update(line_shape=shape))
    figure.update_xaxes(title_text=x).update_yaxes(title_text=y, range=[-0.04, 1.04], tickformat=".0%")
    return figure


def audit_dots(table: pd.DataFrame, *, title: str = "") -> go.Figure:
    """Draw the audit: a row an attack or benign set, a panel a model, points with their Wilson intervals.

    Args:
        table: columns `model`, `attack`, `kind`, `n`, `compliance`, `low`, `high`, `degenerate`.
        title: what the figure shows.
    """
    need(table, "audit_dots", "rows")
    models, attacks = table["model"].unique(), table["attack"].unique()
    names = [safe(model) for model in models]
    figure = make_subplots(1, len(models), subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.03)
    for column, model in enumerate(models, start=1):
        figure.add_traces([*audit_points(table[table["model"] == model], legend=column == 1)], rows=1, cols=column)
    figure.update_xaxes(
        range=[-0.06, 1.06], tickvals=[0, 0.5, 1], ticktext=["0", "50", "100"], showgrid=True, gridcolor=GRID
    )
    figure.update_xaxes(title_text="complied (%)")
    order = [safe(attack) for attack in reversed(attacks)]
    figure.update_yaxes(categoryorder="array", categoryarray=order, range=[-0.6, len(attacks) - 0.4], dtick=1)
    note = f"with Wilson 95 % intervals; {cases([Measured(table['compliance'], n=table['n'])])}"
    return apply_style(
        figure, title or "Share of prompts complied with, by attack", note, height=190 + 25 * len(attacks)
    )


def audit_success(table: pd.DataFrame) -> go.Figure:
    """Every attack and benign task, a panel a model."""
    return audit_dots(table)


def pareto_defences(found: DefenceComparison, against: str = "benign") -> go.Figure:
    """The defences: mean attack success against what is left of a rate that ought to stay high."""
    both = (found.measured(rate) for rate in ("attack", against))
    title = f"Defences on the test split: attack success against {MEASURES[against]}"
    figure = pareto_front(*both, names=found.titles, title=title, listed=True)
    return figure.update_xaxes(title_text=MEASURES[against])


def hardening_frontier(found: HardeningResults) -> go.Figure:
    """Hardened and other models: the most successful attack of the goal against what is left of benign answers."""
    both = found.measured_worst(), found.measured("benign")
    title = "The most successful of all re-fitted edits and prefill, against harmless and borderline answers"
    figure = pareto_front(*both, names=found.titles, title=title, listed=True)
    return figure.update_xaxes(title_text=MEASURES["benign"])


def hardening_blocks(found: HardeningResults, assault: str = "ot_all") -> go.Figure:
    """Success of one way to edit refusal away by block, each block at its best K, a curve a defence."""
    title = f"{EDIT_ATTACKS[assault].title}: success by block, best of K = {found.ks(assault)}"
    return layer_lines(found.by_block(assault), "attack success", title=title)
