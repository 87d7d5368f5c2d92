"""Figures of the suite: arrays in, `plotly.graph_objects.Figure` out; nothing here shows or writes one.

Values that are not finite are left blank. Every figure can be read at a width of 700 px.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from replib.ablation.fit import window
from replib.ablation.sweep import best_of
from replib.core.errors import ReplibError
from replib.core.stats import Measured, Numbers, numbers
from replib.edits.methods import METHODS
from replib.figures.layers import FRAME, FRAMED, layer_lines
from replib.figures.style import SYMBOLS, apply_style, colour_bar, safe, styled
from replib.figures.traces import as_measured, cases, need, rate_cells, whiskers

BETWEEN = 64  # pixels between the panels of a column: a title, ticks and their unit
NARROW = 16  # blocks whose rates can be read in half of the width


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
    return apply_style(figure, title, note, height=inner + 160)


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
    return apply_style(figure, title or "Attack success against its price", note.lstrip("; "), height=440)


ANSWERED = "KL on own answers, all tokens (nats)"
DISTINCT = ["method", "layer", "k", "positions"]


def sweep(tables: pd.DataFrame, positions: str, *, by: str = "model") -> go.Figure:
    """Attack success by block and K, a panel a model, each edit re-fitted on that model.

    A panel more for each further strength and fit position; blank where no answers were generated.
    """
    table = tables[(tables.method == "pca_ot") & (tables.positions == positions)]
    ks = sorted(table.k.unique().tolist())
    groups = {
        ", ".join(filter(None, (name, *_changed(strength, read)))): rows
        for (name, strength, read), rows in table.groupby([by, "strength", "read"], sort=False, dropna=False)
    }
    windows = {name: found for name, rows in groups.items() if (found := window(rows.depth.iloc[0]))}
    title = f"Attack success of PCA-OT at one block, edited positions: {positions}"
    return sweep_heatmap({name: _grid(rows, ks) for name, rows in groups.items()}, ks, title=title, windows=windows)


def _grid(rows: pd.DataFrame, ks: Sequence[int]) -> Measured:
    every = range(rows.depth.iloc[0])
    wide = {
        c: rows.pivot(index="layer", columns="k", values=c).reindex(every, columns=ks).to_numpy()
        for c in ("compliance", "low", "high", "n")
    }
    return Measured(wide["compliance"], low=wide["low"], high=wide["high"], n=wide["n"])


def methods(tables: pd.DataFrame, model: str, marks: Mapping[str, Any] | None = None) -> go.Figure:
    """Attack success by block on one model, a curve a method and edited position; PCA-OT at each block's best K.

    ``marks``: as for ``figures.layer_lines``, beside the window of 40 to 60 % of the depth.
    """
    title = f"Attack success on {model}, by the block that the edit is fitted on"
    return _profile(tables, model, ("compliance", "low", "high"), "attack success", title, marks)


def cheap(tables: pd.DataFrame, model: str, marks: Mapping[str, Any] | None = None) -> go.Figure:
    """The cheap score by block, as ``methods`` shows attack success: below 0, refusal is the less likely beginning."""
    title = f"Cheap score on {model}, by the block that the edit is fitted on"
    columns = ("log_odds", "log_odds_low", "log_odds_high")
    return _profile(tables, model, columns, "log-odds of refusal, first token", title, marks)


def _profile(
    tables: pd.DataFrame,
    model: str,
    columns: tuple[str, str, str],
    unit: str,
    title: str,
    marks: Mapping[str, Any] | None,
) -> go.Figure:
    """Value, low and high by block, a curve an edit, each block at its best K."""
    rows, edit = tables[tables.model == model], ["method", "positions", "strength", "read"]
    best = best_of(rows, *edit, "layer", by=columns[0]).sort_values("layer")
    curves = {}
    for name, curve in best.groupby(edit, dropna=False):
        value, low, high, n, at = (curve[column].to_numpy() for column in (*columns, "n", "layer"))
        curves[edit_name(*name)] = Measured(value, low=low, high=high, n=n, at=at)
    middle = window(rows.depth.iloc[0]) if len(rows) else None
    return layer_lines(curves, unit, title=title, marks=marks, window=middle)


def edit_name(method: str, positions: str, strength: float = 1.0, read: Any = None) -> str:
    """How an edit is called in figures: its method, the edited positions, and what differs from the method's source."""
    return ", ".join((METHODS[method].title, positions.replace("_", " "), *_changed(strength, read)))


def _changed(strength: float, read: Any) -> list[str]:
    where = [] if pd.isna(read) else [f"fitted at {read}".replace("_", " ")]
    return [*([] if strength == 1 else [f"strength {strength:g}"]), *where]


def tradeoff(best: pd.DataFrame, damage: pd.DataFrame, title: str) -> go.Figure:
    """Attack success of edits against what they do to harmless requests: exact KL over the model's own answers.

    ``damage``: ``Sweeper.damage`` of these very edits, in this order.
    """
    if best.empty:
        raise ReplibError("There are no edits to compare: run a sweep first.")
    success, cost = best.reset_index(drop=True), damage[damage.metric == ANSWERED].reset_index(drop=True)
    if not success[DISTINCT].equals(cost[DISTINCT]):
        raise ReplibError("The damage is of other edits: measure it of cells_of(best), in that order.")
    return tradeoff_scatter(
        Measured(success.compliance, low=success.low, high=success.high, n=success.n),
        Measured(cost.change, low=cost.change_low, high=cost.change_high, n=cost.n),
        names=[edit_name(*x) for x in zip(best.method, best.positions, strict=True)],
        unit="KL on harmless requests (nats a token, own answers)",
        title=title,
    )
