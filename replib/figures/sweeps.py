"""Figures of ablation sweeps: success by block and K, curves of each edit, success against damage."""

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
from replib.figures.layers import FRAME, FRAMED, layer_curves
from replib.figures.style import SYMBOLS, apply_style, safe, styled
from replib.figures.traces import as_measured, case_note, join_notes, need, rate_axis, rate_cells, whiskers

_ON_ANSWERS = "KL on own answers, all tokens (nats)"
_EDIT = ["method", "layer", "k", "positions"]
_BETWEEN = 64  # pixels between the panels of a column, for a title, ticks and their unit
_NARROW = 16  # blocks whose rates are legible in half of the width


def sweep_heatmap(tables: pd.DataFrame, positions: str) -> go.Figure:
    """Attack success of PCA-OT by block and K, a panel a model, strength and fit position.

    Each edit is fitted on the model that it edits; cells without generated answers are blank.
    """
    table = tables[(tables.method == "pca_ot") & (tables.positions == positions)]
    ks = sorted(table.k.unique().tolist())
    groups = {
        ", ".join(filter(None, (name, *_changed(strength, read)))): rows
        for (name, strength, read), rows in table.groupby(["model", "strength", "read"], sort=False, dropna=False)
    }
    windows = {name: middle for name, rows in groups.items() if (middle := window(rows.depth.iloc[0]))}
    title = f"Attack success of PCA-OT at one block, edited positions: {positions}"
    return _heatmap({name: _rates(rows, ks) for name, rows in groups.items()}, ks, title=title, windows=windows)


def _rates(rows: pd.DataFrame, ks: Sequence[int]) -> Measured:
    every = range(rows.depth.iloc[0])
    wide = {
        c: rows.pivot(index="layer", columns="k", values=c).reindex(every, columns=ks).to_numpy()
        for c in ("compliance", "low", "high", "n")
    }
    return Measured(wide["compliance"], low=wide["low"], high=wide["high"], n=wide["n"])


def method_curves(tables: pd.DataFrame, model: str, marks: Mapping[str, Any] | None = None) -> go.Figure:
    """Attack success by block on one model, a curve a method and edited position; PCA-OT at each block's best K.

    ``marks`` as for ``layer_curves``, beside the window of 40 to 60 % of the depth.
    """
    title = f"Attack success on {model}, by the block that the edit is fitted on"
    return _curves(tables, model, ("compliance", "low", "high"), "attack success", title, marks)


def first_token_curves(tables: pd.DataFrame, model: str, marks: Mapping[str, Any] | None = None) -> go.Figure:
    """First-token score by block, a curve an edit; below 0 an answer is likelier than a refusal."""
    title = f"First-token score on {model}, by the block that the edit is fitted on"
    columns = ("log_odds", "log_odds_low", "log_odds_high")
    return _curves(tables, model, columns, "log-odds of refusal, first token", title, marks)


def _curves(
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
    return layer_curves(curves, unit, title, marks=marks, window=middle)


def edit_name(method: str, positions: str, strength: float = 1.0, read: Any = None) -> str:
    """Title of an edit: method, edited positions, and strength or fit position if not the method's own."""
    return ", ".join((METHODS[method].title, positions.replace("_", " "), *_changed(strength, read)))


def _changed(strength: float, read: Any) -> list[str]:
    fitted = [] if pd.isna(read) else [f"fitted at {read}".replace("_", " ")]
    return [*([] if strength == 1 else [f"strength {strength:g}"]), *fitted]


def tradeoff(best: pd.DataFrame, damage: pd.DataFrame, title: str) -> go.Figure:
    """Attack success of edits against their damage, the exact KL on the model's own answers to harmless requests.

    ``damage`` is ``Sweeper.damage`` of the same edits in the same order.

    Raises:
        ReplibError: there are no edits, or the damage is of other edits.
    """
    if best.empty:
        raise ReplibError("There are no edits to compare. Run a sweep first.")
    success, cost = best.reset_index(drop=True), damage[damage.metric == _ON_ANSWERS].reset_index(drop=True)
    if not success[_EDIT].equals(cost[_EDIT]):
        raise ReplibError("The damage is of other edits. Measure it for cells_of(best), in that order.")
    return _tradeoff(
        Measured(success.compliance, low=success.low, high=success.high, n=success.n),
        Measured(cost.change, low=cost.change_low, high=cost.change_high, n=cost.n),
        names=[edit_name(*x) for x in zip(best.method, best.positions, strict=True)],
        unit="KL on harmless requests (nats a token, own answers)",
        title=title,
    )


def _heatmap(
    panels: Mapping[str, Measured | Numbers],
    ks: Sequence[int],
    *,
    title: str,
    windows: Mapping[str, tuple[int, int]] | None = None,
) -> go.Figure:
    """Rates over blocks and ranks K, a panel a model, on a colour scale fixed from 0 to 1.

    Args:
        panels: name -> [layers, len(ks)]; cells that were not measured (NaN) stay blank.
        ks: the ranks.
        title: title of the figure.
        windows: name of a panel -> first and last block between 40 and 60 % of the depth, which are framed.
    """
    need(panels, "sweep_heatmap", "panels")
    measured = {name: as_measured(panel) for name, panel in panels.items()}
    depth = max(np.shape(panel.value)[0] for panel in measured.values())
    columns, written = 1 if depth > _NARROW else min(2, len(panels)), depth <= 2 * _NARROW
    rows = -(-len(panels) // columns)
    inner = rows * (26 + 27 * len(ks)) + (rows - 1) * _BETWEEN
    names = [safe(name) for name in panels]
    figure = make_subplots(rows, columns, subplot_titles=names, vertical_spacing=_BETWEEN / inner)
    for place, (name, panel) in enumerate(measured.items()):
        at = {"row": place // columns + 1, "col": place % columns + 1}
        figure.add_trace(_cells(panel, ks, written=written), **at)
        if windows and name in windows:
            first, last = windows[name]
            sides = {"x0": first - 0.5, "x1": last + 0.5, "y0": -0.5, "y1": len(ks) - 0.5}
            figure.add_shape(type="rect", line=FRAME, **sides, **at)
    dtick = -(-depth // (16 if columns > 1 else 32))
    figure.update_xaxes(title_text="block", title_standoff=4, dtick=dtick, tickangle=0, tickfont_size=11, ticks="")
    figure.update_yaxes(type="category", showgrid=False, ticks="").update_yaxes(title_text="rank K", col=1)
    figure.update_layout(coloraxis=rate_axis("attack success"), plot_bgcolor="#E4E7EA")
    blank = any(np.isnan(numbers(panel.value)).any() for panel in measured.values())
    notes = (written, "numbers in per cent"), (windows, FRAMED), (blank, "grey: not measured")
    note = join_notes(case_note(measured.values()), *(text for shown, text in notes if shown))
    return apply_style(figure, title, note, height=inner + 160)


def _cells(panel: Measured, ks: Sequence[int], *, written: bool) -> go.Heatmap:
    """Rates [layers, ranks] of one panel, ranks upwards."""
    rates = numbers(panel.value)
    if rates.ndim != 2 or rates.shape[1] != len(ks):
        raise ReplibError(f"sweep_heatmap got rates {rates.shape} for {len(ks)} ranks. Pass [layers, {len(ks)}].")
    hover = "block %{x}, K = %{y}<br>%{customdata}"
    ranks = [str(k) for k in ks]
    return rate_cells(rates.T, x=None, y=ranks, words=panel.words().T, hover=hover, written=written, size=10)


def _tradeoff(success: Measured, cost: Measured, *, names: Sequence[str], unit: str, title: str = "") -> go.Figure:
    """Attack success against a cost in ``unit``, a named point an edit."""
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
    note = join_notes(case_note([success]), "" if success.low is None else "bars: 95 % intervals")
    return apply_style(figure, title or "Attack success against its cost", note, height=440)
