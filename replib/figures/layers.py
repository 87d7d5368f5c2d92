"""Results in, figures out: what the notebooks draw, one function a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from replib.activations.store import Activations
from replib.analysis.geometry import pca
from replib.analysis.profile import LayerProfile
from replib.core.stats import Measured, Numbers
from replib.figures.style import AMBER, DASHES, INK, apply_style, safe, styled
from replib.figures.traces import as_measured, band, cases, clouds, component, counts, curve_lines, need

Place = int | float
MOST_BANDS = 3  # more bands on each other are mud
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
    return apply_style(figure, title or "Prompts on the two widest directions of one layer", counts(labels), height=460)


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
    return apply_style(figure, title or "The same prompts in the base and in the bent model", note, height=430)


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
    apply_style(figure, title or "Where in depth the prompts come apart", note, height=110 + 150 * rows)
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
    return apply_style(figure, title, note, height=420)


LABELS = ("harmful", "harmless")
Pair = tuple[Activations, Activations]  # harmful, harmless


def _cloud(pair: Pair, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Both classes on the two principal axes of one block: points [n, 2] and explained shares [2]."""
    found = pca(torch.cat([acts[layer] for acts in pair]))
    return found.scores.numpy(), found.ratio.numpy()


def _labels(pair: Pair) -> list[str]:
    return [name for name, acts in zip(LABELS, pair, strict=True) for _ in range(len(acts))]


def clusters(pair: Pair, texts: Sequence[str] = ()) -> dict[int, go.Figure]:
    """One scatter a block, for ``scrub_layers``: PCA fitted on that block alone."""
    found = {layer: _cloud(pair, layer) for layer in pair[0].layers}
    return {
        layer: cluster_scatter(
            points,
            _labels(pair),
            explained=shares,
            texts=texts,
            title=f"Prompts at block {layer}, last prompt token",
        )
        for layer, (points, shares) in found.items()
    }


def clusters_grid(pair: Pair, layers: Sequence[int]) -> go.Figure:
    """Small multiples of ``clusters``."""
    return cluster_scatter_grid({i: _cloud(pair, i)[0] for i in layers}, _labels(pair))


def clusters_pair(base: Pair, bent: Pair, layer: int, texts: Sequence[str] = ()) -> go.Figure:
    """The same prompts in base and bent model at one block, each on its own principal axes."""
    (a, shares_a), (b, shares_b) = _cloud(base, layer), _cloud(bent, layer)
    shares, title = np.stack([shares_a, shares_b]), f"The same prompts in the base and in the bent model, block {layer}"
    return cluster_scatter_pair(a, b, labels=_labels(base), explained=shares, texts=texts, title=title)


def distances(profile: LayerProfile) -> go.Figure:
    """Mean distance between the classes beside the distance within each: spread alone is not separation."""
    n = sum(profile.n)
    curves = {
        "between the classes": Measured(profile["between"], n=n),
        "between the means": Measured(profile["centroids"], n=n),
        "within harmful": Measured(profile["within_harmful"], n=n),
        "within harmless": Measured(profile["within_harmless"], n=n),
    }
    return layer_lines(
        curves,
        "mean L2 distance",
        title="How far apart the classes are, and how wide",
    )


def divergence(profiles: Mapping[str, LayerProfile], **options: Any) -> go.Figure:
    """Classifier bound of the Jensen-Shannon divergence by block, with bootstrap intervals and the permutation null."""
    first = next(iter(profiles.values()))
    curves = {name: Measured(p["js"], low=p["js_low"], high=p["js_high"], n=sum(p.n)) for name, p in profiles.items()}
    null = Measured(
        np.zeros_like(first["js"]), low=np.minimum(first["js_null"], 0), high=np.maximum(first["js_null"], 0)
    )
    return layer_lines(curves, "JS divergence (nats)", null=null,
                               title="How well one vector tells harmful from harmless", **options)  # fmt: skip


def transport_gap(profile: LayerProfile) -> go.Figure:
    """Debiased squared Bures-Wasserstein parts by block, per unit of within-class variance, and what chance gives."""
    names, spread = ("mean", "covariance"), profile["spread"]
    curves = {name: Measured(profile[f"bw_{name}"] / spread, n=sum(profile.n)) for name in names}
    low, high = ([profile[f"bw_{name}_{side}"] / spread for name in names] for side in ("low", "high"))
    null = Measured(np.zeros_like(spread), low=np.min(low, 0), high=np.max(high, 0))
    return layer_lines(curves, "squared distance / variance", null=null,
                               title="What separates the two Gaussians")  # fmt: skip


def by_block(curves: Mapping[str, Any], unit: str, title: str, *, n: int | None = None) -> go.Figure:
    """Any named quantities by block, each point of them from ``n`` prompts."""
    return layer_lines({name: Measured(x, n=n) for name, x in curves.items()}, unit, title=title)
