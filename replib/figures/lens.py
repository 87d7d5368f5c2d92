"""Figure of logit lens readings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from replib.analysis.logit_lens import LensComparison, LensTrajectory
from replib.core.errors import ReplibError
from replib.core.stats import numbers
from replib.figures.style import INK, apply_style, cell, colour_bar, safe
from replib.figures.traces import need

# Light throughout, so that dark text is legible in every cell; low entropy is saturated.
_CONFIDENCE = ("#41B6C4", "#7FCDBB", "#C7E9B4", "#EDF8B1", "#FFFFE5")


def lens_heatmap(reading: LensTrajectory | LensComparison, title: str = "") -> go.Figure:
    """Entropy (colour, nats) and most probable next token (text) at every block and token.

    A comparison has panels of base and bent model on one colour scale, side by side, or stacked if wide.
    """
    panels = [reading] if isinstance(reading, LensTrajectory) else [reading.base, reading.bent]
    inputs, layers = panels[0].tokens, list(panels[0].layers)
    need(inputs, "lens_heatmap", "input tokens")
    depth = len(layers)
    rows, columns = (len(panels), 1) if len(inputs) > 7 else (1, len(panels))
    names = ("base", "bent") if len(panels) > 1 else None
    figure = make_subplots(rows, columns, subplot_titles=names, vertical_spacing=0.1, horizontal_spacing=0.12)
    limit = max(2, 76 // (columns * len(inputs)))
    for place, panel in enumerate(panels):
        figure.add_trace(_cells(panel, limit), row=1 + place // columns, col=1 + place % columns)
    ticks = [cell(token, limit + 2) for token in inputs]
    figure.update_xaxes(tickvals=np.arange(len(inputs)), ticktext=ticks, tickfont_size=12, ticks="", showline=False)
    figure.update_yaxes(tickvals=np.arange(depth), ticktext=_row_names(layers), tickfont_size=12, ticks="")
    figure.update_xaxes(title_text="token read", title_standoff=8, row=rows)
    figure.update_yaxes(showgrid=False).update_yaxes(title_text="block", col=1)
    figure.update_layout(coloraxis={"cmin": 0, "colorscale": _CONFIDENCE, "colorbar": colour_bar("entropy (nats)")})
    default = "Next token predicted after each block" + (", base and bent model" if names else "")
    return apply_style(figure, title or default, height=150 + rows * (50 + 25 * depth))


def _row_names(layers: Sequence[int]) -> list[str]:
    """Block numbers; the last of all blocks is the model's output."""
    every = list(layers) == [*range(len(layers))]
    return [*map(str, layers[:-1]), "output"] if every else [*map(str, layers)]


def _cells(panel: LensTrajectory, limit: int) -> go.Heatmap:
    entropy, words = numbers(panel.entropy.numpy()), panel.words
    shape = len(words), len(panel.tokens)
    if entropy.shape != shape:
        raise ReplibError(f"The lens has entropy {entropy.shape} for tokens {shape}. Pass both of the same tokens.")
    whole = [
        [f"{safe(word)}<br>after reading {safe(read)}" for word, read in zip(row, panel.tokens, strict=True)]
        for row in words
    ]
    return go.Heatmap(
        z=entropy,
        text=[[cell(word, limit) for word in row] for row in words],
        texttemplate="%{text}",
        textfont={"size": 11, "color": INK},
        customdata=whole,
        hovertemplate="block %{y}: %{customdata}<br>entropy %{z:.2f} nats<extra></extra>",
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )
