"""Traces and texts that several figures share."""

from collections.abc import Iterable, Sized
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from replib.core.errors import ReplibError
from replib.core.stats import Measured, Numbers, Values, numbers
from replib.figures.style import colour_bar, faint, safe

BENIGN_KINDS = frozenset({"harmless", "borderline", "skill", "skills", "benign"})


def need(items: Sized, figure: str, what: str) -> None:
    """Raise ReplibError if a figure has no items to draw."""
    if len(items) == 0:
        raise ReplibError(f"{figure} got no {what}: there is nothing to draw. Pass at least one.")


def as_measured(values: Measured | Numbers, n: int | None = None) -> Measured:
    """Wrap a bare array, each value from ``n`` cases."""
    return values if isinstance(values, Measured) else Measured(values, n=n)


def case_note(measured: Iterable[Measured]) -> str:
    """Number of cases behind a point, as `n = 80 to 96 a point`; empty if unknown."""
    known = np.concatenate([numbers(item.n).ravel() for item in measured])
    known = known[np.isfinite(known)].astype(int)
    if not known.size:
        return ""
    low, high = known.min(), known.max()
    return f"n = {low} a point" if low == high else f"n = {low} to {high} a point"


def band(curve: Measured, name: str, colour: str, *, showlegend: bool = False) -> go.Scatter:
    """Area between `low` and `high` as one closed line."""
    low, high = numbers(curve.low), numbers(curve.high)
    at = numbers(np.arange(low.size) if curve.at is None else curve.at)
    known = np.isfinite(low) & np.isfinite(high)
    x, y = np.r_[at[known], at[known][::-1]], np.r_[high[known], low[known][::-1]]
    line, fill = {"width": 0}, faint(colour)
    kind = {"mode": "lines", "fill": "toself", "hoverinfo": "skip"}  # default mode would add markers to short lines
    return go.Scatter(x=x, y=y, fillcolor=fill, line=line, name=name, showlegend=showlegend, **kind)


def curve_lines(
    curve: Measured, name: str, colour: str, *, dash: str, axis: str = "block", banded: bool = True
) -> list[go.Scatter]:
    """Line of a curve, after the band of its intervals if it has them and ``banded`` is set."""
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


def measured_only(curve: Measured, steps: Values) -> Measured:
    """Drop steps without a value (NaN), so that a sparse probe is drawn as one line."""
    known = np.isfinite(numbers(curve.value))

    def select(part: Numbers | None) -> Values | None:
        return None if part is None else numbers(part, steps)[known]

    return Measured(
        numbers(curve.value)[known], select(curve.low), select(curve.high), select(curve.n), at=steps[known]
    )


def rate_cells(
    value: Values, *, x: Any, y: Any, words: NDArray[Any], hover: str, written: bool = True, size: int = 12
) -> go.Heatmap:
    """Heatmap of rates [rows, columns] on the figure's colour axis, written into the cells in per cent or not."""
    text = [[f"{100 * rate:.0f}" if np.isfinite(rate) else "" for rate in row] for row in value]
    return go.Heatmap(
        z=value,
        x=x,
        y=y,
        text=text,
        texttemplate="%{text}" if written else None,
        textfont={"size": size},
        customdata=words.tolist(),
        hovertemplate=hover + "<extra></extra>",
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )


def rate_axis(title: str, **bar: Any) -> dict[str, Any]:
    """Colour axis of rates, fixed from 0 to 1, so that figures compare."""
    colours = colour_bar(title, tickformat=".0%", **bar)
    return {"cmin": 0, "cmax": 1, "colorscale": "Oranges", "colorbar": colours}


def whiskers(measured: Measured, place: int | slice | NDArray[np.intp], colour: str) -> dict[str, Any]:
    """Error bars from `low` to `high`; empty if there is no interval."""
    if measured.low is None or measured.high is None:
        return {}
    value, low, high = (np.atleast_1d(numbers(part)[place]) for part in (measured.value, measured.low, measured.high))
    return {"array": high - value, "arrayminus": value - low, "color": colour, "thickness": 1.5, "width": 3}


def join_notes(*parts: str) -> str:
    """Join the parts of a note that are not empty."""
    return "; ".join(filter(None, parts))
