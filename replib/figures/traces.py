"""Pieces of figures: measured arrays and the traces that draw them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray

from replib.core.errors import ReplibError
from replib.core.stats import Measured, Numbers, Values, numbers
from replib.figures.style import BLUE, INK, SYMBOLS, VERMILLION, cell, faint, safe, styled, wrapped

BENIGN = frozenset({"harmless", "borderline", "skill", "skills", "benign"})


def need(things: Sized, figure: str, what: str) -> None:
    """Refuse to draw nothing."""
    if len(things) == 0:
        raise ReplibError(f"{figure} got no {what}: there is nothing to draw. Pass at least one.")


def as_measured(values: Measured | Numbers) -> Measured:
    """Take a bare array as measured, with nothing known about it."""
    return values if isinstance(values, Measured) else Measured(values)


def cases(measured: Iterable[Measured]) -> str:
    """Say how many cases stand behind a point, `n = 80 to 96 a point`; nothing where unknown."""
    known = np.concatenate([numbers(item.n).ravel() for item in measured])
    known = known[np.isfinite(known)].astype(int)
    if not known.size:
        return ""
    low, high = known.min(), known.max()
    return f"n = {low} a point" if low == high else f"n = {low} to {high} a point"


def counts(labels: Sequence[str]) -> str:
    """Count the points by label: `n = 96 harmful + 96 harmless`."""
    return "n = " + " + ".join(f"{count} {label}" for label, count in Counter(labels).items())


def component(number: int, shares: Values) -> str:
    """Title the axis of a principal component."""
    return f"PC{number} ({shares[number - 1]:.1%} of variance)"


def clouds(
    points: Numbers, labels: Sequence[str], texts: Sequence[str], *, legend: bool = True
) -> Iterator[go.Scatter]:
    """Yield one cloud of points a label."""
    need(labels, "clusters", "points")
    places = numbers(points)
    if places.shape != (len(labels), 2):
        raise ReplibError(
            f"clusters got points {places.shape} for {len(labels)} labels. Pass points [n, 2] and n labels."
        )
    names, hover = np.array(labels), np.array([wrapped(text) for text in texts], dtype=np.str_)
    for symbol, (label, _, colour, _) in zip(cycle(SYMBOLS), styled(dict.fromkeys(labels).items()), strict=False):
        rows = names == label
        yield go.Scatter(
            x=places[rows, 0],
            y=places[rows, 1],
            mode="markers",
            name=safe(label),
            legendgroup=label,
            showlegend=legend,
            marker={"color": colour, "size": 7, "opacity": 0.7, "symbol": symbol},
            text=hover[rows].tolist() if texts else None,
            hovertemplate=safe(label) + ("<br>%{text}" if texts else "") + "<extra></extra>",
        )


def band(curve: Measured, name: str, colour: str, *, showlegend: bool = False) -> go.Scatter:
    """Draw the area between `low` and `high` as one closed line."""
    low, high = numbers(curve.low), numbers(curve.high)
    at = numbers(np.arange(low.size) if curve.at is None else curve.at)
    known = np.isfinite(low) & np.isfinite(high)
    x, y = np.r_[at[known], at[known][::-1]], np.r_[high[known], low[known][::-1]]
    line, fill = {"width": 0}, faint(colour)
    kind = {"mode": "lines", "fill": "toself", "hoverinfo": "skip"}  # plotly marks the points of short lines else
    return go.Scatter(x=x, y=y, fillcolor=fill, line=line, name=name, showlegend=showlegend, **kind)


def curve_lines(
    curve: Measured, name: str, colour: str, *, dash: str, axis: str = "block", banded: bool = True
) -> list[go.Scatter]:
    """Draw a curve, and below it the band of its intervals where it has them and ``banded`` asks for it."""
    value = numbers(curve.value)
    line = go.Scatter(
        x=numbers(np.arange(value.size) if curve.at is None else curve.at),
        y=value,
        mode="lines+markers" if value.size <= 60 else "lines",
        line={"color": colour, "dash": dash, "width": 2.2},
        marker={"size": 6},
        name=safe(name),
        legendgroup=name,
        showlegend=True,
        text=curve.words().tolist(),
        hovertemplate=f"{safe(name)}<br>{axis} %{{x}}: %{{text}}<extra></extra>",
    )
    return [line] if curve.low is None or not banded else [band(curve, name, colour).update(legendgroup=name), line]


def present(curve: Measured, steps: Values) -> Measured:
    """Keep the steps at which something was measured, so that a sparse probe is drawn as one line."""
    known = np.isfinite(numbers(curve.value))

    def keep(part: Numbers | None) -> Values | None:
        return None if part is None else numbers(part, steps)[known]

    return Measured(numbers(curve.value)[known], keep(curve.low), keep(curve.high), keep(curve.n), at=steps[known])


def lens_cells(entropy: Values, tokens: Sequence[Sequence[str]], *, inputs: Sequence[str], limit: int) -> go.Heatmap:
    """Draw one logit lens: entropy [layers, tokens] as colour, tokens as writing."""
    if entropy.shape != (len(tokens), len(inputs)):
        need = f"[{len(tokens)} layers, {len(inputs)} tokens]"
        raise ReplibError(
            f"the lens got entropy {entropy.shape} where its tokens need {need}. Pass both of one window."
        )
    whole = [
        [f"{safe(word)}<br>after reading {safe(read)}" for word, read in zip(row, inputs, strict=True)]
        for row in tokens
    ]
    return go.Heatmap(
        z=entropy,
        text=[[cell(word, limit) for word in row] for row in tokens],
        texttemplate="%{text}",
        textfont={"size": 11, "color": INK},
        customdata=whole,
        hovertemplate="block %{y}: %{customdata}<br>entropy %{z:.2f} nats<extra></extra>",
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )


def rate_cells(panel: Measured, ks: Sequence[int], *, written: bool = True) -> go.Heatmap:
    """Draw one table of rates [layers, ranks], ranks upwards, their numbers ``written`` into the cells or not."""
    rates = numbers(panel.value)
    if rates.ndim != 2 or rates.shape[1] != len(ks):
        raise ReplibError(f"sweep_heatmap got rates {rates.shape} for {len(ks)} ranks. Pass [layers, {len(ks)}].")
    return go.Heatmap(
        z=rates.T,
        y=[str(k) for k in ks],
        text=[[f"{100 * rate:.0f}" if np.isfinite(rate) else "" for rate in row] for row in rates.T],
        texttemplate="%{text}" if written else None,
        textfont={"size": 10},
        customdata=panel.words().T.tolist(),
        hovertemplate="block %{x}, K = %{y}<br>%{customdata}<extra></extra>",
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )


def audit_points(rows: pd.DataFrame, *, legend: bool) -> Iterator[go.Scatter]:
    """Yield attack points, benign points and the share of degenerate answers of one model."""
    benign = rows["kind"].isin(BENIGN)
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


def whiskers(measured: Measured, place: int | slice | NDArray[np.intp], colour: str) -> dict[str, Any]:
    """Describe error bars that reach from `low` to `high`, and none where there is no interval."""
    if measured.low is None or measured.high is None:
        return {}
    value, low, high = (np.atleast_1d(numbers(part)[place]) for part in (measured.value, measured.low, measured.high))
    return {"array": high - value, "arrayminus": value - low, "color": colour, "thickness": 1.5, "width": 3}
