"""Live figures: ipywidgets controls around one thin view (`static/view.js`) that draws with `Plotly.react`.

A scrub sends its figures once and moves in the browser, with no call to the kernel. Its display data also
carry the figures under `VIEW_MIME`, from which `replib.figures.report` builds the same interaction without a kernel.
"""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import pandas as pd
import plotly.graph_objects as go
import traitlets
from plotly.offline import get_plotlyjs

from replib.core.errors import ReplibError
from replib.experiments.response_surface import COEFFICIENTS, ResponseSurface
from replib.figures.response import ResponseView

VIEW_MIME = "application/vnd.replib.view+json"
STATIC = Path(__file__).parent / "static"
Point = Mapping[str, Any]
Draw = Callable[[Point], go.Figure]


class PlotlyLoader(anywidget.AnyWidget):
    """Hands plotly.js, which the plotly wheel ships, to a page; all views of a kernel share one."""

    _esm = "export default {}"
    source = traitlets.Bytes().tag(sync=True)


class ScrubView(anywidget.AnyWidget):
    """Figures that controls in the browser choose among.

    Attributes:
        payload: controls, first figure and what differs in the others, as plain JSON (see `static/view.js`).
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


class Retrainer(ipywidgets.VBox):
    """A coefficient scrub with a button that trains at new coefficients and adds the result."""

    def __init__(self, view: ScrubView, fields: Sequence[ipywidgets.FloatText], train: Callable[[], None]) -> None:
        self.view, self.train = view, train
        self.button = ipywidgets.Button(description="Retrain at these coefficients", layout={"width": "auto"})
        self.button.on_click(lambda _: self.retrain())
        self.status = ipywidgets.Label("The button starts a real training run; the sliders do not.")
        super().__init__([view, ipywidgets.HBox([*fields, self.button]), self.status])

    def retrain(self) -> None:
        """Run the training and say how it went; what the user can mend is shown, other errors are raised."""
        self.button.disabled, self.status.value = True, "Training …"
        try:
            self.train()
            self.status.value = "Trained, and added to the sliders."
        except ReplibError as error:
            self.status.value = f"Not trained: {error}"
        finally:
            self.button.disabled = False

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return {**super()._repr_mimebundle_(**kwargs), VIEW_MIME: self.view.payload}


def scrub_layers(figures_by_layer: Mapping[int | str, go.Figure], *, title: str = "", name: str = "block") -> ScrubView:
    """Move through figures of layers: by slider and play button where numbered, by menu where named."""
    if not figures_by_layer:
        raise ReplibError("scrub_layers got no figures. Pass a mapping of layer to figure.")
    menu = any(isinstance(layer, str) for layer in figures_by_layer)
    control = {"name": name, "values": [str(layer) for layer in figures_by_layer], "menu": menu}
    return ScrubView(_payload(title, [control], {(k,): figure for k, figure in enumerate(figures_by_layer.values())}))


def scrub_coefficients(
    points: Sequence[Point],
    draw: Draw,
    *,
    names: Sequence[str] = ("alpha", "beta", "gamma"),
    retrain: Callable[..., Point] | None = None,
    title: str = "",
) -> ScrubView | Retrainer:
    """Move through settings that were really trained.

    Sliders offer only coefficients that occur in `points`; where their combination was not trained, the view
    says so and shows the nearest one that was, by name.

    Args:
        points: trained settings: each has the coefficients in `names` and whatever `draw` reads.
        draw: figure of one point.
        names: the coefficients, a slider each.
        retrain: called with the coefficients as keywords, trains and returns a new point; adds the button.
        title: heading of the controls.
    """
    points = list(points)
    view = ScrubView(_coefficient_payload(points, draw, names, title))
    if retrain is None:
        return view
    fields = [ipywidgets.FloatText(points[0][name], description=name, layout={"width": "170px"}) for name in names]

    def train() -> None:
        wanted = dict(zip(names, (field.value for field in fields), strict=True))
        payload = _coefficient_payload([*points, point := retrain(**wanted)], draw, names, title)
        points.append(point)
        with view.hold_sync():
            view.payload, view.position = payload, payload["frames"][-1]["at"]

    return Retrainer(view, fields, train)


def scrub_response(
    response: ResponseSurface, *, about: str = "", retrain: Callable[..., Point] | None = None, title: str = ""
) -> ScrubView | Retrainer:
    """Move through all coefficients between the trained ones, at once: outcomes are interpolated, and say so.

    Args:
        response: fitted on trained settings.
        about: what else the figure is to say of them: seed, steps, which step was read.
        retrain: called with the coefficients as keywords, trains and returns a setting with its rates; adds the button.
        title: heading of the controls.
    """
    fitted = [response]
    view = ScrubView(_response_payload(ResponseView(response, about), title))
    if retrain is None:
        return view
    first = response.trained.iloc[0]
    fields = [ipywidgets.FloatText(first[name], description=name, layout={"width": "170px"}) for name in COEFFICIENTS]

    def train() -> None:
        wanted = dict(zip(COEFFICIENTS, (field.value for field in fields), strict=True))
        rows = pd.concat([pd.DataFrame([retrain(**wanted)]), fitted[0].trained], ignore_index=True)
        fitted[0] = ResponseSurface.fit(rows, response.n)
        payload = _response_payload(ResponseView(fitted[0], about), title)
        with view.hold_sync():
            view.payload, view.position = payload, payload["frames"][0]["at"]

    return Retrainer(view, fields, train)


def _response_payload(view: ResponseView, title: str) -> dict[str, Any]:
    """Frames of three sheets; a place of None stands for any index of that control."""
    axes = zip(COEFFICIENTS, view.axes, strict=True)
    controls = [{"name": name, "values": [f"{value:g}" for value in axis], "menu": False} for name, axis in axes]
    frames = [{"at": list(at), "change": change} for at, change in view.places()]
    return {"title": title, "controls": controls, "figure": _tree(view.figure()), "frames": frames}


def _coefficient_payload(points: Sequence[Point], draw: Draw, names: Sequence[str], title: str) -> dict[str, Any]:
    if not points:
        raise ReplibError("scrub_coefficients got no trained settings. Pass at least one point.")
    lacking = [name for name in names if any(name not in point for point in points)]
    if lacking:
        raise ReplibError(f"A trained setting lacks {', '.join(lacking)}. Give every point {', '.join(names)}.")
    values = [sorted({point[name] for point in points}) for name in names]
    places = [tuple(axis.index(point[name]) for name, axis in zip(names, values, strict=True)) for point in points]
    if len(set(places)) < len(places):
        raise ReplibError("Two trained settings have the same coefficients. Keep one, or average them.")
    axes = zip(names, values, strict=True)
    controls = [{"name": name, "values": [f"{value:g}" for value in axis], "menu": False} for name, axis in axes]
    return _payload(title, controls, {place: draw(point) for place, point in zip(places, points, strict=True)})


def _payload(
    title: str, controls: list[dict[str, Any]], figures: Mapping[tuple[int, ...], go.Figure]
) -> dict[str, Any]:
    """Describe figures as the first one and what differs in each; places are indices into the controls."""
    trees = {place: _tree(figure) for place, figure in figures.items()}
    first = next(iter(trees.values()))
    frames = [{"at": list(place), "change": _change(first, tree)} for place, tree in trees.items()]
    return {"title": title, "controls": controls, "figure": first, "frames": frames}


def _tree(figure: go.Figure) -> dict[str, Any]:
    """Return a figure as JSON with its traces by number, so that two figures can be compared key by key."""
    plain = json.loads(figure.to_json())
    return {"data": {str(k): trace for k, trace in enumerate(plain["data"])}, "layout": plain["layout"]}


def _change(base: Any, other: Any) -> Any:
    """Return what differs in `other`; keys that it lacks become None. An array counts as one value."""
    if not (isinstance(base, dict) and isinstance(other, dict)) or "bdata" in base or "bdata" in other:
        return other
    gone = dict.fromkeys(base.keys() - other.keys())
    return gone | {key: _change(base.get(key), value) for key, value in other.items() if value != base.get(key)}


def _binary(value: Any) -> Any:
    """Replace base64 arrays by bytes, which the widget protocol sends as binary buffers."""
    if isinstance(value, dict):
        return {key: base64.b64decode(item) if key == "bdata" else _binary(item) for key, item in value.items()}
    return [_binary(item) for item in value] if isinstance(value, list) else value


@cache
def _loader() -> PlotlyLoader:
    return PlotlyLoader(source=get_plotlyjs().encode())
