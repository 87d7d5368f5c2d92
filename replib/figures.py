"""Figures of the suite: arrays in, `plotly.graph_objects.Figure` out; nothing here shows or writes one.

Values that are not finite are left blank. Every figure can be read at a width of 700 px.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from replib.core.stats import Measured, Numbers, numbers
from replib.figure_parts import (
    as_measured,
    audit_points,
    band,
    cases,
    clouds,
    component,
    counts,
    curve_lines,
    lens_cells,
    need,
    present,
    rate_cells,
    whiskers,
)
from replib.figure_style import AMBER, DASHES, GRID, INK, SYMBOLS, cell, colour_bar, dress, safe, styled

Place = int | float
# Light throughout, so that dark writing can be read in every cell; a sure block is saturated.
CONFIDENCE = ("#41B6C4", "#7FCDBB", "#C7E9B4", "#EDF8B1", "#FFFFE5")
MOST_BANDS = 3  # more bands on each other are mud
BETWEEN = 64  # pixels between the panels of a column: a title, ticks and their unit
NARROW = 16  # blocks whose rates can be read in half of the width
FRAME, FRAMED = {"color": INK, "width": 1.5, "dash": "dot"}, "framed: 40–60 % of the depth"
MARKS = ("#EBD9A8", "#CFE3F5", "#E3D5EC")


def cluster_scatter(
    points: Numbers,
    labels: Sequence[str],
    *,
    explained: Numbers,
    texts: Sequence[str] = (),
    title: str = "",
) -> go.Figure:
    """Draw prompts on two principal components of one layer.

    Args:
        points: [n, 2] coordinates.
        labels: [n] names such as `harmful` and `harmless`.
        explained: [2] shares of variance, in [0, 1].
        texts: [n] texts to read on hovering.
        title: what the figure shows.
    """
    figure = go.Figure([*clouds(points, labels, texts)])
    shares = np.asarray(explained, dtype=float)
    figure.update_xaxes(title_text=component(1, shares)).update_yaxes(title_text=component(2, shares))
    return dress(figure, title or "Prompts on the two widest directions of one layer", counts(labels), height=460)


def cluster_scatter_pair(
    base: Numbers,
    bent: Numbers,
    *,
    labels: Sequence[str],
    explained: Numbers,
    texts: Sequence[str] = (),
    title: str = "",
) -> go.Figure:
    """Draw the same prompts in two models side by side.

    `explained` of shape [2] says that one basis serves both panels, which then share their axes; of
    shape [2, 2] that each model has its own basis and scale.
    """
    shares = np.asarray(explained, dtype=float)
    joint = "all" if shares.ndim == 1 else False
    figure = make_subplots(
        1, 2, subplot_titles=("base", "bent"), shared_xaxes=joint, shared_yaxes=joint, horizontal_spacing=0.14
    )
    for column, points in enumerate((base, bent), start=1):
        share = np.broadcast_to(shares, (2, 2))[column - 1]
        figure.add_traces([*clouds(points, labels, texts, legend=column == 1)], rows=1, cols=column)
        figure.update_xaxes(title_text=component(1, share), col=column)
        figure.update_yaxes(title_text=component(2, share), col=column)
    note = f"{counts(labels)}; {'one basis and scale' if joint else 'own basis and scale in each panel'}"
    return dress(figure, title or "The same prompts in the base and in the bent model", note, height=430)


def cluster_scatter_grid(
    points: Mapping[int | str, Numbers], labels: Sequence[str], *, columns: int = 4, title: str = ""
) -> go.Figure:
    """Draw small multiples of `clusters`, a panel a layer, each on its own scale. points: layer -> [n, 2]."""
    need(points, "clusters_grid", "layers")
    rows = -(-len(points) // columns)
    names = [f"block {layer}" if isinstance(layer, int) else safe(layer) for layer in points]
    spacing = {"vertical_spacing": 0.28 / (rows + 1), "horizontal_spacing": 0.03}
    figure = make_subplots(rows, columns, subplot_titles=names, **spacing)
    for place, layer_points in enumerate(points.values()):
        traces = [*clouds(layer_points, labels, (), legend=place == 0)]
        figure.add_traces(traces, rows=place // columns + 1, cols=place % columns + 1)
    figure.update_traces(marker_size=4)
    figure.update_xaxes(showticklabels=False, ticks="", mirror=True)
    figure.update_yaxes(showticklabels=False, ticks="", showgrid=False, showline=True, mirror=True)
    note = f"PC1 across, PC2 up, own scale in each panel; {counts(labels)}"
    dress(figure, title or "Where in depth the prompts come apart", note, height=110 + 150 * rows)
    return figure.update_layout(margin_b=44)


def layer_lines(
    curves: Mapping[str, Measured | Numbers],
    unit: str,
    *,
    title: str,
    null: Measured | None = None,
    marks: Mapping[str, Place | tuple[Place, Place]] | None = None,
    window: tuple[int, int] | None = None,
) -> go.Figure:
    """Draw named quantities by block, with their intervals where given (of many curves, on hovering only).

    Args:
        curves: name -> [layers].
        unit: title of the vertical axis, with its unit.
        title: what the figure shows.
        null: the band (`low`, `high`) that the quantity keeps to when there is nothing to find.
        marks: name -> block, or (from, to) on the block axis, drawn behind the curves.
        window: first and last block between 40 and 60 % of the depth, which are framed.
    """
    need(curves, "layer_lines", "curves")
    figure, measured = go.Figure(), [as_measured(curve) for curve in curves.values()]
    banded = sum(curve.low is not None for curve in measured) <= MOST_BANDS
    if null is not None:
        figure.add_trace(band(null, "null band", AMBER, showlegend=True))
    for name, curve, colour, used in styled(curves.items()):
        dash = DASHES[used % len(DASHES)]
        figure.add_traces(curve_lines(as_measured(curve), name, colour, dash=dash, banded=banded))
    for colour, (name, place) in zip(cycle(MARKS), (marks or {}).items(), strict=False):
        label = {"name": safe(name), "showlegend": True, "layer": "below"}
        if isinstance(place, tuple):
            figure.add_vrect(*place, fillcolor=colour, opacity=0.6, line_width=0, **label)
        else:
            figure.add_vline(place, line={"color": INK, "dash": "dot", "width": 1.5}, **label)
    if window:
        figure.add_vrect(window[0] - 0.5, window[1] + 0.5, line=FRAME, layer="below")
    layers = max(np.shape(curve.value)[0] for curve in measured)
    figure.update_xaxes(title_text="block", dtick=-(-layers // 16))
    figure.update_yaxes(title_text=safe(unit), rangemode="tozero")
    hidden = "" if banded else "95 % intervals on hovering"
    note = "; ".join(filter(None, [cases(measured), hidden, FRAMED if window else ""]))
    return dress(figure, title, note, height=420)


def lens_heatmap(
    entropy: Numbers,
    tokens: Sequence[Sequence[str]],
    *,
    inputs: Sequence[str],
    layers: Sequence[int] = (),
    title: str = "",
) -> go.Figure:
    """Draw the logit lens: colour is entropy in nats, the writing is the most probable token.

    Args:
        entropy: [layers, tokens].
        tokens: [layers][tokens] most probable tokens.
        inputs: [tokens] what was read.
        layers: [layers] their numbers; where not given, all blocks, of which the last is the output.
        title: what the figure shows.
    """
    title = title or "What each block would say next"
    return _lens([entropy], [tokens], inputs=inputs, layers=layers, title=title)


def lens_heatmap_pair(
    entropies: Sequence[Numbers],
    tokens: Sequence[Sequence[Sequence[str]]],
    *,
    inputs: Sequence[str],
    layers: Sequence[int] = (),
    title: str = "",
) -> go.Figure:
    """Draw the lens of base and bent model on one colour scale, side by side, or stacked if wide."""
    title = title or "What each block would say next, base and bent"
    return _lens(entropies, tokens, inputs=inputs, layers=layers, title=title)


def sweep_heatmap(
    panels: Mapping[str, Measured | Numbers],
    ks: Sequence[int],
    *,
    title: str,
    unit: str = "attack success",
    windows: Mapping[str, tuple[int, int]] | None = None,
) -> go.Figure:
    """Draw rates over blocks and ranks K, a panel a model or method, on a colour scale fixed from 0 to 1.

    Args:
        panels: name -> [layers, len(ks)]; cells that were not measured (NaN) stay blank.
        ks: the ranks.
        title: what the figure shows.
        unit: what the rates are.
        windows: name of a panel -> first and last block between 40 and 60 % of the depth, which are framed.
    """
    need(panels, "sweep_heatmap", "panels")
    depth = max(np.shape(as_measured(panel).value)[0] for panel in panels.values())
    columns, written = 1 if depth > NARROW else min(2, len(panels)), depth <= 2 * NARROW
    rows = -(-len(panels) // columns)
    names = [safe(name) for name in panels]
    inner = rows * (26 + 27 * len(ks)) + (rows - 1) * BETWEEN
    figure = make_subplots(rows, columns, subplot_titles=names, vertical_spacing=BETWEEN / inner)
    for place, (name, panel) in enumerate(panels.items()):
        at = {"row": place // columns + 1, "col": place % columns + 1}
        figure.add_trace(rate_cells(as_measured(panel), ks, written=written), **at)
        if windows and name in windows:
            first, last = windows[name]
            sides = {"x0": first - 0.5, "x1": last + 0.5, "y0": -0.5, "y1": len(ks) - 0.5}
            figure.add_shape(type="rect", line=FRAME, **sides, **at)
    dtick = -(-depth // (16 if columns > 1 else 32))
    figure.update_xaxes(title_text="block", title_standoff=4, dtick=dtick, tickangle=0, tickfont_size=11, ticks="")
    figure.update_yaxes(type="category", showgrid=False, ticks="").update_yaxes(title_text="rank K", col=1)
    bar = colour_bar(safe(unit), tickformat=".0%")
    figure.update_layout(
        coloraxis={"cmin": 0, "cmax": 1, "colorscale": "Oranges", "colorbar": bar}, plot_bgcolor="#E4E7EA"
    )
    blank = any(np.isnan(numbers(as_measured(panel).value)).any() for panel in panels.values())
    told = (written, "numbers in per cent"), (windows, FRAMED), (blank, "grey: not measured")
    note = "; ".join(filter(None, [cases(map(as_measured, panels.values())), *(text for said, text in told if said)]))
    return dress(figure, title, note, height=inner + 160)


def training_curves(
    panels: Mapping[str, Mapping[str, Measured | Numbers]],
    *,
    steps: Numbers,
    chosen: int | None = None,
    title: str = "",
) -> go.Figure:
    """Draw what a training logged, panels above each other on one step axis.

    Args:
        panels: vertical axis with its unit -> name -> [steps]; NaN where a probe did not run.
        steps: [steps] the step numbers.
        chosen: the step that the validation probe chose.
        title: what the figure shows.
    """
    need(panels, "training_curves", "panels")
    rows = len(panels)
    figure = make_subplots(rows, 1, shared_xaxes=True, vertical_spacing=0.16 / rows)
    for row, (unit, curves) in enumerate(panels.items(), start=1):
        legend = f"legend{row + 1}"  # the first legend is the one below the figure
        for name, curve, colour, used in styled(curves.items()):
            probed = present(as_measured(curve), np.asarray(steps, np.float64))
            lines = curve_lines(probed, name, colour, dash=DASHES[used % len(DASHES)], axis="step")
            figure.add_traces([line.update(legend=legend) for line in lines], rows=row, cols=1)
        figure.update_yaxes(title_text=safe(unit), row=row)
        top = next(figure.select_yaxes(row=row)).domain[1]
        place = {"orientation": "v", "x": 1.01, "xref": "paper", "y": top, "yref": "paper", "yanchor": "top"}
        figure.update_layout({legend: place})
    if chosen is not None:
        figure.add_vline(chosen, line={"color": INK, "dash": "dot", "width": 1.5})
    figure.update_xaxes(title_text="step", row=rows)
    note = "" if chosen is None else f"dotted: step {chosen}, chosen on the validation prompts"
    return dress(figure, title or "What the training did, step by step", note, height=110 + 165 * rows)


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
    return dress(figure, title or "Share of prompts complied with, by attack", note, height=190 + 25 * len(attacks))


def tradeoff_scatter(
    success: Measured, cost: Measured, *, names: Sequence[str], unit: str, title: str = ""
) -> go.Figure:
    """Draw attack success against its cost, a named point an edit or defence; `unit` titles the cost axis."""
    need(names, "tradeoff", "points")
    figure, x, y = go.Figure(), numbers(cost.value), numbers(success.value)
    for place, (name, _, colour, used) in enumerate(styled(dict.fromkeys(map(str, names)).items())):
        hover = f"{safe(name)}<br>attack success {success.words()[place]}<br>{safe(unit)} {cost.words()[place]}"
        figure.add_scatter(
            x=x[[place]],
            y=y[[place]],
            error_x=whiskers(cost, place, colour),
            error_y=whiskers(success, place, colour),
            mode="markers",
            name=safe(name),
            marker={"size": 11, "color": colour, "symbol": SYMBOLS[used % len(SYMBOLS)]},
            hovertemplate=hover + "<extra></extra>",
            cliponaxis=False,
        )
    figure.update_xaxes(title_text=safe(unit), rangemode="tozero")
    figure.update_yaxes(title_text="attack success", title_standoff=12, tickformat=".0%", range=[-0.06, 1.1])
    note = cases([success]) + ("; bars: 95 % intervals" if success.low is not None else "")
    return dress(figure, title or "Attack success against its price", note.lstrip("; "), height=440)


def _lens(
    entropies: Sequence[Numbers],
    tokens: Sequence[Sequence[Sequence[str]]],
    *,
    inputs: Sequence[str],
    layers: Sequence[int],
    title: str,
) -> go.Figure:
    need(inputs, "lens", "input tokens")
    depth, panels = len(tokens[0]), len(entropies)
    rows, columns = (panels, 1) if len(inputs) > 7 else (1, panels)
    titles = ("base", "bent")[:panels] if panels > 1 else None
    figure = make_subplots(rows, columns, subplot_titles=titles, vertical_spacing=0.1, horizontal_spacing=0.12)
    limit = max(2, 76 // (columns * len(inputs)))
    for place, (entropy, words) in enumerate(zip(entropies, tokens, strict=True)):
        trace = lens_cells(numbers(entropy), words, inputs=inputs, limit=limit)
        figure.add_trace(trace, row=1 + place // columns, col=1 + place % columns)
    ticks = [cell(token, limit + 2) for token in inputs]
    figure.update_xaxes(tickvals=np.arange(len(inputs)), ticktext=ticks, tickfont_size=12, ticks="", showline=False)
    names = [*map(str, layers or range(depth - 1)), *([] if layers else ["output"])]
    figure.update_yaxes(tickvals=np.arange(depth), ticktext=names, tickfont_size=12, ticks="", showgrid=False)
    figure.update_xaxes(title_text="token read", title_standoff=8, row=rows).update_yaxes(title_text="block", col=1)
    figure.update_layout(coloraxis={"cmin": 0, "colorscale": CONFIDENCE, "colorbar": colour_bar("entropy (nats)")})
    return dress(figure, title, height=150 + rows * (50 + 25 * depth))
