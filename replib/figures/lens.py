"""Figures of the suite: arrays in, `plotly.graph_objects.Figure` out; nothing here shows or writes one.

Values that are not finite are left blank. Every figure can be read at a width of 700 px.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from replib.analysis.logit_lens import LensComparison, LensTrajectory
from replib.core.stats import Numbers, numbers
from replib.figures.style import apply_style, cell, colour_bar
from replib.figures.traces import lens_cells, need

# Light throughout, so that dark writing can be read in every cell; a sure block is saturated.
CONFIDENCE = ("#41B6C4", "#7FCDBB", "#C7E9B4", "#EDF8B1", "#FFFFE5")


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
    return apply_style(figure, title, height=150 + rows * (50 + 25 * depth))


def lens_grid(found: LensTrajectory, title: str = "") -> go.Figure:
    """Entropy and likeliest token at every block."""
    return lens_heatmap(found.entropy.numpy(), found.words, inputs=found.tokens, title=title)


def lens_pair(found: LensComparison, title: str = "") -> go.Figure:
    """Base and bent model on the very same tokens."""
    both = (found.base, found.bent)
    return lens_heatmap_pair(
        [t.entropy.numpy() for t in both], [t.words for t in both], inputs=found.base.tokens, title=title
    )
