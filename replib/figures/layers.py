"""Figures by block: prompts on principal axes, and curves of any quantity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from replib.activations.store import Activations
from replib.analysis.geometry import pca
from replib.analysis.profile import LayerProfile
from replib.core.errors import ReplibError
from replib.core.stats import Measured, Numbers, Values, numbers
from replib.figures.style import AMBER, DASHES, INK, SYMBOLS, apply_style, safe, styled, wrapped
from replib.figures.traces import as_measured, band, case_note, curve_lines, join_notes, need

_Pair = tuple[Activations, Activations]
"""Activations of harmful and of harmless prompts."""
Place = int | float
_MOST_BANDS = 3  # more bands hide each other
FRAME, FRAMED = {"color": INK, "width": 1.5, "dash": "dot"}, "framed: 40–60 % of the depth"
_MARKS = ("#EBD9A8", "#CFE3F5", "#E3D5EC")


def clusters(pair: _Pair, layer: int, texts: Sequence[str] = ()) -> go.Figure:
    """Prompts of both classes on the two principal axes of one block; ``texts`` are shown on hovering."""
    points, shares = _principal(pair, layer)
    title = f"Prompts at block {layer}, last prompt token"
    return _scatter(points, _labels(pair), explained=shares, texts=texts, title=title)


def clusters_pair(base: _Pair, bent: _Pair, layer: int, texts: Sequence[str] = ()) -> go.Figure:
    """The same prompts in base and bent model at one block, each on its own principal axes."""
    (a, shares_a), (b, shares_b) = _principal(base, layer), _principal(bent, layer)
    title = f"The same prompts in the base and the bent model, block {layer}"
    explained = np.stack([shares_a, shares_b])
    return _scatter_pair(a, b, labels=_labels(base), explained=explained, texts=texts, title=title)


def clusters_grid(pair: _Pair, layers: Sequence[int]) -> go.Figure:
    """Small panels of ``clusters``, one for each layer, each on its own scale."""
    return _scatter_grid({i: _principal(pair, i)[0] for i in layers}, _labels(pair))


def distances(profile: LayerProfile) -> go.Figure:
    """Mean distance between the classes, between their means, and within each class, by block."""
    curves = {
        "between the classes": profile["between"],
        "between the means": profile["centroids"],
        "within harmful": profile["within_harmful"],
        "within harmless": profile["within_harmless"],
    }
    return layer_curves(curves, "mean L2 distance", "Distances between and within the classes", n=sum(profile.n))


def divergence(profiles: Mapping[str, LayerProfile]) -> go.Figure:
    """Classifier bound of the Jensen-Shannon divergence by block, with bootstrap intervals and permutation null."""
    first = next(iter(profiles.values()))
    curves = {name: Measured(p["js"], low=p["js_low"], high=p["js_high"], n=sum(p.n)) for name, p in profiles.items()}
    null = Measured(
        np.zeros_like(first["js"]), low=np.minimum(first["js_null"], 0), high=np.maximum(first["js_null"], 0)
    )
    return layer_curves(curves, "JS divergence (nats)", "How well one vector tells harmful from harmless", null=null)


def transport_gap(profile: LayerProfile) -> go.Figure:
    """Debiased squared Bures-Wasserstein distance by block, mean and covariance part over the within-class variance."""
    names, spread = ("mean", "covariance"), profile["spread"]
    curves = {name: profile[f"bw_{name}"] / spread for name in names}
    low, high = ([profile[f"bw_{name}_{side}"] / spread for name in names] for side in ("low", "high"))
    null = Measured(np.zeros_like(spread), low=np.min(low, 0), high=np.max(high, 0))
    unit = "squared distance / variance"
    return layer_curves(curves, unit, "Mean and covariance part of the transport gap", n=sum(profile.n), null=null)


def layer_curves(
    curves: Mapping[str, Measured | Numbers],
    unit: str,
    title: str,
    *,
    n: int | None = None,
    null: Measured | None = None,
    marks: Mapping[str, Place | tuple[Place, Place]] | None = None,
    window: tuple[int, int] | None = None,
) -> go.Figure:
    """Named quantities by block; intervals of more than three curves are shown on hovering.

    Args:
        curves: name -> [layers].
        unit: title of the vertical axis, with its unit.
        title: title of the figure.
        n: prompts behind each point of a bare array.
        null: band (`low`, `high`) of the quantity under the null hypothesis.
        marks: name -> block, or (from, to) on the block axis, drawn behind the curves.
        window: first and last block between 40 and 60 % of the depth, which are framed.
    """
    need(curves, "layer_curves", "curves")
    figure, measured = go.Figure(), {name: as_measured(curve, n) for name, curve in curves.items()}
    banded = sum(curve.low is not None for curve in measured.values()) <= _MOST_BANDS
    if null is not None:
        figure.add_trace(band(null, "null band", AMBER, showlegend=True))
    for name, curve, colour, used in styled(measured.items()):
        figure.add_traces(curve_lines(curve, name, colour, dash=DASHES[used % len(DASHES)], banded=banded))
    _add_marks(figure, marks or {})
    if window:
        figure.add_vrect(window[0] - 0.5, window[1] + 0.5, line=FRAME, layer="below")
    layers = max(np.shape(curve.value)[0] for curve in measured.values())
    figure.update_xaxes(title_text="block", dtick=-(-layers // 16))
    figure.update_yaxes(title_text=safe(unit), rangemode="tozero")
    hidden = "" if banded else "95 % intervals on hovering"
    note = join_notes(case_note(measured.values()), hidden, FRAMED if window else "")
    return apply_style(figure, title, note, height=420)


def _add_marks(figure: go.Figure, marks: Mapping[str, Place | tuple[Place, Place]]) -> None:
    for colour, (name, place) in zip(cycle(_MARKS), marks.items(), strict=False):
        label = {"name": safe(name), "showlegend": True, "layer": "below"}
        if isinstance(place, tuple):
            figure.add_vrect(*place, fillcolor=colour, opacity=0.6, line_width=0, **label)
        else:
            figure.add_vline(place, line={"color": INK, "dash": "dot", "width": 1.5}, **label)


def _principal(pair: _Pair, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Both classes on the two principal axes of one block: points [n, 2] and explained shares [2]."""
    fitted = pca(torch.cat([acts[layer] for acts in pair]))
    return fitted.scores.numpy(), fitted.ratio.numpy()


def _labels(pair: _Pair) -> list[str]:
    return [name for name, acts in zip(("harmful", "harmless"), pair, strict=True) for _ in range(len(acts))]


def _scatter(
    points: Numbers, labels: Sequence[str], *, explained: Numbers, texts: Sequence[str] = (), title: str = ""
) -> go.Figure:
    """Points [n, 2] with labels [n]; explained [2] are shares of variance in [0, 1]."""
    figure = go.Figure([*_clouds(points, labels, texts)])
    shares = np.asarray(explained, dtype=float)
    figure.update_xaxes(title_text=_component(1, shares)).update_yaxes(title_text=_component(2, shares))
    return apply_style(figure, title or "Prompts on the principal axes of one block", _counts(labels), height=460)


def _scatter_pair(
    base: Numbers,
    bent: Numbers,
    *,
    labels: Sequence[str],
    explained: Numbers,
    texts: Sequence[str] = (),
    title: str = "",
) -> go.Figure:
    """Two panels; explained [2, 2] has the shares of each model's own axes."""
    figure = make_subplots(1, 2, subplot_titles=("base", "bent"), horizontal_spacing=0.14)
    for column, (points, share) in enumerate(zip((base, bent), np.asarray(explained, float), strict=True), start=1):
        figure.add_traces([*_clouds(points, labels, texts, legend=column == 1)], rows=1, cols=column)
        figure.update_xaxes(title_text=_component(1, share), col=column)
        figure.update_yaxes(title_text=_component(2, share), col=column)
    note = f"{_counts(labels)}; own basis and scale in each panel"
    return apply_style(figure, title or "The same prompts in the base and the bent model", note, height=430)


def _scatter_grid(points: Mapping[int | str, Numbers], labels: Sequence[str], *, columns: int = 4) -> go.Figure:
    """points: layer -> [n, 2]."""
    need(points, "clusters_grid", "layers")
    rows = -(-len(points) // columns)
    names = [f"block {layer}" if isinstance(layer, int) else safe(layer) for layer in points]
    spacing = {"vertical_spacing": 0.28 / (rows + 1), "horizontal_spacing": 0.03}
    figure = make_subplots(rows, columns, subplot_titles=names, **spacing)
    for place, layer_points in enumerate(points.values()):
        traces = [*_clouds(layer_points, labels, (), legend=place == 0)]
        figure.add_traces(traces, rows=place // columns + 1, cols=place % columns + 1)
    figure.update_traces(marker_size=4)
    figure.update_xaxes(showticklabels=False, ticks="", mirror=True)
    figure.update_yaxes(showticklabels=False, ticks="", showgrid=False, showline=True, mirror=True)
    note = f"PC1 across, PC2 up, own scale in each panel; {_counts(labels)}"
    apply_style(figure, "Separation of the classes by block", note, height=110 + 150 * rows)
    return figure.update_layout(margin_b=44)


def _clouds(
    points: Numbers, labels: Sequence[str], texts: Sequence[str], *, legend: bool = True
) -> Iterator[go.Scatter]:
    """Yield the markers of each label."""
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


def _component(number: int, shares: Values) -> str:
    return f"PC{number} ({shares[number - 1]:.1%} of variance)"


def _counts(labels: Sequence[str]) -> str:
    """Number of points by label, as `n = 96 harmful + 96 harmless`."""
    return "n = " + " + ".join(f"{count} {label}" for label, count in Counter(labels).items())
