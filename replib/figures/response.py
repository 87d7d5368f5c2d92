"""Figure of interpolated outcomes at one setting of the coefficients, with two maps of the settings around it.

It has three sheets: ``outcomes`` depends on all coefficients, ``maps`` on gamma, ``cross`` on alpha and beta. A page
stores only the values of each sheet, so that thousands of places fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from replib.core.stats import Measured, interval_text, numbers, wilson
from replib.experiments.response_surface import COEFFICIENTS, FloatArray, ResponseSurface
from replib.figures.style import BLUE, GREY, INK, VERMILLION, apply_style
from replib.figures.traces import BENIGN_KINDS, rate_axis

GREEK = dict(zip(COEFFICIENTS, "αβγ", strict=True))
_MAPPED = ("attack", "harmless")
_OFFSET = 0.17  # of a row: interpolated above, trained below
Change = dict[str, Any]


@dataclass(frozen=True)
class ResponseView:
    """Response surface on a grid: the trained values of each coefficient and a value between each two."""

    response: ResponseSurface
    about: str = ""
    """Further settings for the note: seed, and the step of the outcomes."""

    @cached_property
    def axes(self) -> list[FloatArray]:
        """Values of each coefficient, ascending."""
        return [self._axis(number) for number in range(len(COEFFICIENTS))]

    def _axis(self, number: int) -> FloatArray:
        scale, (low, high) = self.response.scale, self.response.box[number]
        values = np.unique(self.response.points[:, number])
        values = values[(low <= values) & (values <= high)]
        between = [scale.back(scale(pair[:, None]).mean(axis=0))[number] for pair in _neighbours(values)]
        return np.unique([*values, *(float(f"{x:.2g}") for x in between)])

    @cached_property
    def rates(self) -> Mapping[str, Measured]:
        """Rate -> interpolated values, arrays [alphas, betas, gammas]."""
        shape = [len(axis) for axis in self.axes]
        found = self.response.predict(np.array([*product(*self.axes)]))
        return {
            name: Measured(*(numbers(x).reshape(shape) for x in (m.value, m.low, m.high))) for name, m in found.items()
        }

    @property
    def start(self) -> tuple[int, ...]:
        """Indices of the first trained setting on the grid."""
        inside = (
            p for p in self.response.points if all(np.isin(x, axis) for x, axis in zip(p, self.axes, strict=True))
        )
        first = next(inside, [axis[0] for axis in self.axes])
        return tuple(int(np.searchsorted(axis, x)) for x, axis in zip(first, self.axes, strict=True))

    def places(self) -> Iterator[tuple[tuple[int | None, ...], Change]]:
        """Yield the indices of each sheet (None for any value of that coefficient) and its change of the figure."""
        every = [range(len(axis)) for axis in self.axes]
        first = self.start
        for at in sorted(product(*every), key=lambda at: at != first):
            yield at, {"data": self.outcomes(at)}
        for c in every[2]:
            yield (None, None, c), {"data": self.maps(c)}
        for a, b in product(every[0], every[1]):
            yield (a, b, None), {"data": self.cross(a, b)}

    def outcomes(self, at: Sequence[int]) -> Change:
        """Interpolated rates with their bands, and rates of the nearest trained setting, by number of trace."""
        point = np.array([axis[i] for axis, i in zip(self.axes, at, strict=True)])
        number = int(self.response.nearest(point)[0])
        a, b, c = at
        interpolated = [[float(numbers(x)[a, b, c]) for x in (m.value, m.low, m.high)] for m in self.rates.values()]
        trained = self.response.points[number]
        words = ", ".join(f"{GREEK[c]} {x:g}" for c, x in zip(COEFFICIENTS, trained, strict=True))
        name = f"{'trained right here' if np.array_equal(trained, point) else 'nearest trained'}: {words}"
        return {"0": _bars(interpolated), "1": _bars(self.intervals[number]) | {"name": name}}

    @cached_property
    def intervals(self) -> list[list[tuple[float, ...]]]:
        """Rates of each trained setting with their Wilson 95 % intervals."""
        rows, n = self.response.trained.to_dict("records"), self.response.n
        return [[(row[name], *wilson(round(row[name] * n[name]), n[name])) for name in self.rates] for row in rows]

    def maps(self, number: int) -> Change:
        """Both maps at one gamma, with the trained settings as dots."""
        points, (low, high) = self.response.points, self.response.box.T
        shown = ((points >= low) & (points <= high)).all(axis=1) & (points[:, 2] == self.axes[2][number])
        x, y = (_short(self._places(points[shown, c], c)) for c in range(2))
        dots = {"x": x, "y": y, "customdata": points[shown, :2].tolist()}
        changes: Change = {}
        for place, name in enumerate(_MAPPED):
            changes[str(2 + place)] = {"z": _short(numbers(self.rates[name].value)[..., number].T)}
            changes[str(4 + place)] = dots | {
                "marker": {"color": _short(self.response.trained[name].to_numpy()[shown])}
            }
        return changes

    def cross(self, a: int, b: int) -> Change:
        """Position of the sliders on both maps."""
        x, y = (_short(self._places(self.axes[c][[i]], c)) for c, i in enumerate((a, b)))
        return {str(6 + i): {"x": x, "y": y} for i in range(len(_MAPPED))}

    def figure(self, at: Sequence[int] | None = None) -> go.Figure:
        """Whole figure at one setting, by default ``start``."""
        a, b, c = at or self.start
        values = self.outcomes((a, b, c)) | self.maps(c) | self.cross(a, b)
        figure = make_subplots(
            2,
            2,
            specs=[[{"colspan": 2}, None], [{}, {}]],
            vertical_spacing=0.17,
            horizontal_spacing=0.09,
            subplot_titles=["", *(f"{name}, interpolated" for name in _MAPPED)],
        )
        traces = [(trace, 1, 1) for trace in self._rows()] + [(trace, 2, column) for trace, column in self._mapped()]
        for number, (trace, row, column) in enumerate(traces):
            figure.add_trace(trace.update(values[str(number)]), row=row, col=column)
        self._style_axes(figure)
        return apply_style(
            figure, "Outcomes over α, β and γ, interpolated between trained settings", self._note(), height=640
        )

    def _rows(self) -> Iterator[go.Scatter]:
        """Markers with their bars, a row a rate, interpolated above trained."""
        rows = np.arange(len(self.rates))[::-1]
        colours = [BLUE if name in BENIGN_KINDS else VERMILLION for name in self.rates]
        interpolated = {"marker": {"color": colours, "symbol": "circle"}, "error_x": {"color": GREY, "thickness": 2}}
        trained = {"marker": {"color": INK, "symbol": "diamond-open"}, "error_x": {"color": INK, "thickness": 1}}
        for side, look, name in ((_OFFSET, interpolated, "interpolated, with its 95 % band"), (-_OFFSET, trained, "")):
            scatter = go.Scatter(y=rows + side, mode="markers", name=name, showlegend=True, **look)
            yield scatter.update(marker_size=10, error_x_width=3, hovertemplate="%{customdata}<extra></extra>")

    def _mapped(self) -> Iterator[tuple[Any, int]]:
        """Yield maps, dots and crosses, each twice, with their column."""
        x, y = (_short(self._places(self.axes[c], c)) for c in range(2))
        where = np.stack(np.meshgrid(self.axes[0], self.axes[1]), axis=-1).tolist()
        at = "α %{customdata[0]:g}, β %{customdata[1]:g}: "
        dot = {"size": 11, "coloraxis": "coloraxis", "line": {"color": INK, "width": 1.5}}
        plus = {"size": 17, "symbol": "cross-thin", "line": {"color": BLUE, "width": 3}}
        kinds = (
            go.Heatmap(x=x, y=y, customdata=where, coloraxis="coloraxis", hovertemplate=at + "%{z:.0%}<extra></extra>"),
            go.Scatter(
                mode="markers",
                marker=dot,
                name="trained at this γ",
                hovertemplate=at + "%{marker.color:.0%}, trained<extra></extra>",
            ),
            go.Scatter(mode="markers", marker=plus, name="the sliders", hoverinfo="skip"),
        )
        for kind, column in product(kinds, (1, 2)):
            trace = type(kind)(kind)
            yield (trace if isinstance(trace, go.Heatmap) else trace.update(showlegend=column == 1)), column

    def _style_axes(self, figure: go.Figure) -> None:
        names = [*self.rates][::-1]
        figure.update_xaxes(range=[-0.03, 1.03], tickformat=".0%", title_text="complied", title_standoff=4, row=1)
        figure.update_yaxes(tickvals=[*range(len(names))], ticktext=names, row=1, showgrid=False)
        for number, update in enumerate((figure.update_xaxes, figure.update_yaxes)):
            known, counts = np.unique(self.response.points[:, number], return_counts=True)
            ticks = known[counts > 1]
            places = self._places(self.axes[number], number)
            ends = [places[0] - 0.25, places[-1] + 0.25]
            update(tickvals=_short(self._places(ticks, number)), ticktext=[f"{x:g}" for x in ticks], row=2)
            update(title_text=GREEK[COEFFICIENTS[number]], title_standoff=4, showgrid=False, range=ends, row=2)
        figure.update_layout(coloraxis=rate_axis("complied", len=0.42, y=0.2))

    def _note(self) -> str:
        errors, n = self.response.left_out(), sorted({self.response.n[name] for name in self.rates})
        shown = ", ".join(f"{name} {row['mean']:.1%} (worst {row['worst']:.0%})" for name, row in errors.iterrows())
        parts = [f"{len(self.response.trained)} trained settings, n = {n[0]} to {n[-1]} answers a rate"]
        return "; ".join([*parts, *filter(None, [self.about]), f"error where a setting is left out: {shown}"])

    def _places(self, values: FloatArray, number: int) -> FloatArray:
        return self.response.scale(values[:, None])[:, number]


def _neighbours(values: FloatArray) -> Iterator[FloatArray]:
    """Neighbours, [2] each."""
    return (values[i : i + 2] for i in range(len(values) - 1))


def _bars(rows: Sequence[Sequence[float]]) -> Change:
    """Points with bars; rows are (value, low, high)."""
    value, low, high = np.array(rows).T
    words = [interval_text(*row, ".0%", " ") for row in zip(value, low, high, strict=True)]
    return {
        "x": _short(value),
        "customdata": words,
        "error_x": {"array": _short(high - value), "arrayminus": _short(value - low)},
    }


def _short(values: NDArray[Any]) -> list[Any]:
    return np.round(np.asarray(values, float), 3).tolist()
