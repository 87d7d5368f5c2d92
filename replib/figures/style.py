"""Style of all figures: template, a fixed colour for each name, escaped and shortened texts."""

import html
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import plotly.graph_objects as go

# The palette of Okabe and Ito, distinct under the common kinds of colour blindness.
VERMILLION, BLUE, SKY, _GREEN, AMBER, GREY = "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#737373"
_PALETTE = ("#CC79A7", SKY, AMBER, "#222222", "#8C6BB1", "#4D7C0F")
COLOURS = {
    **dict.fromkeys(("harmful", "unsafe", "attack", "attacks"), VERMILLION),
    **dict.fromkeys(("harmless", "safe", "benign"), BLUE),
    **{"borderline": SKY, "skill": AMBER, "skills": AMBER, "base": GREY, "bent": _GREEN},
    **{"pca": "#8C6BB1", "rfa": "#222222", "actadd": AMBER, "linear": SKY},
}
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "diamond", "square", "cross", "triangle-up")
INK, _RULE, GRID_COLOUR = "#22272E", "#C8CDD3", "#ECEFF2"
_AXIS = {
    "automargin": True,
    "linecolor": _RULE,
    "ticks": "outside",
    "tickcolor": _RULE,
    "title": {"font": {"size": 14}},
    "zeroline": False,
}
FIGURE_TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "Inter, Segoe UI, Helvetica, Arial, sans-serif", "size": 14, "color": INK},
        "colorway": [BLUE, VERMILLION, _GREEN, *_PALETTE],
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": _AXIS | {"showgrid": False, "showline": True},
        "yaxis": _AXIS | {"gridcolor": GRID_COLOUR, "showline": False},
        "title": {
            "x": 0.01,
            "yanchor": "top",
            "font": {"size": 16},
            "subtitle": {"font": {"size": 13, "color": "#59636E"}},
        },
        "legend": {"orientation": "h", "x": 0.01, "xref": "container", "y": 0.01, "yref": "container"},
        "hoverlabel": {"align": "left", "bgcolor": "white", "font": {"size": 13, "color": INK}},
        "hovermode": "closest",
    }
)
_LINE_WIDTH = 82  # characters of a 16 pt title that fit into 700 px


def apply_style(figure: go.Figure, title: str, note: str = "", *, height: int) -> go.Figure:
    """Set template, title and note (wrapped to 700 px), height and margins; return the figure."""
    lines, notes = textwrap.wrap(title, _LINE_WIDTH), textwrap.wrap(note, _LINE_WIDTH + 18)
    text = "<br>".join(safe(line) for line in lines)
    small = "<br>".join(safe(line) for line in notes)
    rows = _legend_rows(figure)
    panels = 24 if figure.layout.annotations else 0
    figure.update_layout(
        template=FIGURE_TEMPLATE,
        title={"text": f'{text}<br><span style="font-size:13px;color:#59636E">{small}</span>' if small else text},
        height=height,
        margin={"l": 64, "r": 24, "t": 30 + 21 * len(lines) + 18 * len(notes) + panels, "b": 60 + 26 * rows},
    )
    return figure.update_annotations(font_size=14)


def styled(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any, str, int]]:
    """Yield name, item, colour and the number of earlier names with this colour.

    A name takes the colour of its first word if `COLOURS` has it, as `bent, K = 2` takes that of `bent`.
    """
    used: Counter[str] = Counter()
    fresh = 0
    for name, item in items:
        word = re.match(r"\w*", name.lower())
        colour = COLOURS.get(word.group() if word else "")
        if colour is None:
            colour, fresh = _PALETTE[fresh % len(_PALETTE)], fresh + 1
        yield name, item, colour, used[colour]
        used[colour] += 1


def safe(text: object) -> str:
    """Escape a text for plotly, where `<` of a special token would open a tag."""
    return html.escape(str(text), quote=False)


def wrapped(text: str, *, width: int = 60, limit: int = 300) -> str:
    """Escape a text and break it into short lines for a hover box."""
    return "<br>".join(safe(line) for line in textwrap.wrap(textwrap.shorten(text, limit, placeholder=" …"), width))


def cell(token: str, limit: int) -> str:
    """Escape and shorten a token for a heatmap cell, with visible white space."""
    shown = token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "·")
    return safe(shown if len(shown) <= limit else shown[: max(1, limit - 1)] + "…")


def faint(colour: str, alpha: float = 0.15) -> str:
    """Add transparency to a colour `#rrggbb`."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def colour_bar(title: str, **more: Any) -> dict[str, Any]:
    """Layout of a vertical colour bar with its title along it."""
    return {
        "title": {"text": title, "side": "right", "font": {"size": 14}},
        "thickness": 14,
        "outlinewidth": 0,
        **more,
    }


def _legend_rows(figure: go.Figure) -> int:
    """Number of lines of the legend below a figure of 700 px."""
    below = [
        item for item in (*figure.data, *figure.layout.shapes) if item.showlegend and item.legend in (None, "legend")
    ]
    return -(-sum(8 * len(item.name) + 52 for item in below) // 640) if figure.layout.legend.orientation != "v" else 0
