"""Live figures: widgets whose controls choose among figures in the browser (`static/view.js`).

A view sends its figures once and moves without the kernel. Its display data carry the figures under `VIEW_MIME` too,
from which `replib.figures.report` builds the same controls without a kernel.
"""

import base64
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import plotly.graph_objects as go
import traitlets
from plotly.offline import get_plotlyjs

from replib.core.errors import ReplibError
from replib.experiments.response_surface import COEFFICIENTS, ResponseSurface
from replib.figures.response import ResponseView

VIEW_MIME = "application/vnd.replib.view+json"
STATIC = Path(__file__).parent / "static"


class PlotlyLoader(anywidget.AnyWidget):
    """Provider of plotly.js to a page, shared by all views of a kernel."""

    _esm = "export default {}"
    source = traitlets.Bytes().tag(sync=True)


class ScrubView(anywidget.AnyWidget):
    """Figures with controls in the browser that choose among them.

    Attributes:
        payload: controls, first figure and differences of the others, as plain JSON (see `static/view.js`).
        position: the chosen index of each control; follows the browser and may be set.
    """

    _esm = STATIC / "view.js"
    _css = STATIC / "view.css"
    payload = traitlets.Dict().tag(sync=True, to_json=lambda payload, _: _binary(payload))
    position = traitlets.List(traitlets.Int()).tag(sync=True)
    plotly = traitlets.Instance(PlotlyLoader).tag(sync=True, **ipywidgets.widget_serialization)

    def __init__(self, payload: dict[str, Any]) -> None:
        super().__init__(payload=payload, position=payload["frames"][0]["at"], plotly=_loader())

    def __repr__(self) -> str:
        names = " × ".join(f"{len(item['values'])} {item['name']}" for item in self.payload["controls"])
        return f"<figures to scrub through: {names}; live in JupyterLab and in the exported report>"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data, metadata = super()._repr_mimebundle_(**kwargs)
        return {**data, VIEW_MIME: self.payload}, metadata


def scrub_layers(figures_by_layer: Mapping[int | str, go.Figure], *, title: str = "", name: str = "block") -> ScrubView:
    """Move through figures of layers by slider and play button, or by menu if a layer has a name."""
    if not figures_by_layer:
        raise ReplibError("scrub_layers got no figures. Pass a mapping of layer to figure.")
    menu = any(isinstance(layer, str) for layer in figures_by_layer)
    control = {"name": name, "values": [str(layer) for layer in figures_by_layer], "menu": menu}
    return ScrubView(_payload(title, [control], {(k,): figure for k, figure in enumerate(figures_by_layer.values())}))


def scrub_response(response: ResponseSurface, *, about: str = "", title: str = "") -> ScrubView:
    """Move through coefficients between the trained ones; outcomes are interpolated and marked as such.

    Args:
        response: surface fitted on trained settings.
        about: further settings for the note of the figure, such as seed and step.
        title: heading of the controls.
    """
    return ScrubView(_response_payload(ResponseView(response, about), title))


def _response_payload(view: ResponseView, title: str) -> dict[str, Any]:
    """Frames of three sheets; an index of None stands for any index of that control."""
    axes = zip(COEFFICIENTS, view.axes, strict=True)
    controls = [{"name": name, "values": [f"{value:g}" for value in axis], "menu": False} for name, axis in axes]
    frames = [{"at": list(at), "change": change} for at, change in view.places()]
    return {"title": title, "controls": controls, "figure": _tree(view.figure()), "frames": frames}


def _payload(
    title: str, controls: list[dict[str, Any]], figures: Mapping[tuple[int, ...], go.Figure]
) -> dict[str, Any]:
    """First figure, and the difference of each from it; places are indices into the controls."""
    trees = {place: _tree(figure) for place, figure in figures.items()}
    first = next(iter(trees.values()))
    frames = [{"at": list(place), "change": _change(first, tree)} for place, tree in trees.items()]
    return {"title": title, "controls": controls, "figure": first, "frames": frames}


def _tree(figure: go.Figure) -> dict[str, Any]:
    """Figure as JSON with its traces by number, so that two figures compare key by key."""
    plain = json.loads(figure.to_json())
    return {"data": {str(k): trace for k, trace in enumerate(plain["data"])}, "layout": plain["layout"]}


def _change(base: Any, other: Any) -> Any:
    """Difference of `other` from `base`; missing keys become None. An array counts as one value."""
    if not (isinstance(base, dict) and isinstance(other, dict)) or "bdata" in base or "bdata" in other:
        return other
    missing = dict.fromkeys(base.keys() - other.keys())
    return missing | {key: _change(base.get(key), value) for key, value in other.items() if value != base.get(key)}


def _binary(value: Any) -> Any:
    """Replace base64 arrays with bytes, which the widget protocol sends as binary buffers."""
    if isinstance(value, dict):
        return {key: base64.b64decode(item) if key == "bdata" else _binary(item) for key, item in value.items()}
    return [_binary(item) for item in value] if isinstance(value, list) else value


@cache
def _loader() -> PlotlyLoader:
    return PlotlyLoader(source=get_plotlyjs().encode())
