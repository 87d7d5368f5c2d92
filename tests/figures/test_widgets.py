"""Views send each figure once and give every figure back."""

import base64
import json
from itertools import product

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from replib.core.errors import ReplibError

pytest.importorskip("anywidget", reason="the extra `notebooks` is not installed")
from replib.experiments.response_surface import ResponseSurface  # noqa: E402
from replib.figures.response import ResponseView  # noqa: E402
from replib.figures.widgets import VIEW_MIME, scrub_layers, scrub_response  # noqa: E402

VALUES = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32)


def draw(row: int, title: str = "same") -> go.Figure:
    return go.Figure(go.Scatter(x=np.arange(50), y=VALUES[row], mode="markers"), {"title": title, "height": 300})


def merged(payload: dict, frame: int) -> dict:
    """Lay a frame over the first figure, as `static/view.js` does."""

    def merge(base, change):
        if not isinstance(base, dict) or not isinstance(change, dict) or "bdata" in base or "bdata" in change:
            return change
        return base | {key: merge(base.get(key), value) for key, value in change.items()}

    return merge(payload["figure"], payload["frames"][frame]["change"])


def test_every_frame_gives_its_figure_back():
    payload = scrub_layers({row: draw(row, f"block {row}") for row in range(4)}).payload
    for row in range(4):
        figure = merged(payload, row)
        got = np.frombuffer(base64.b64decode(figure["data"]["0"]["y"]["bdata"]), np.float32)
        np.testing.assert_array_equal(got, VALUES[row])
        assert figure["layout"]["title"]["text"] == f"block {row}"


def test_frames_hold_only_what_differs():
    payload = scrub_layers({row: draw(row) for row in range(4)}).payload
    assert payload["frames"][0]["change"] == {}
    assert payload["frames"][2]["change"].keys() == {"data"}
    assert payload["frames"][2]["change"]["data"]["0"].keys() == {"y"}


def test_a_key_that_a_later_figure_lacks_is_taken_back():
    plain = draw(1)
    marked = draw(0).update_layout(annotations=[{"text": "here"}])
    payload = scrub_layers({0: marked, 1: plain}).payload
    assert merged(payload, 1)["layout"]["annotations"] is None


def test_arrays_reach_the_browser_as_binary():
    view = scrub_layers({row: draw(row) for row in range(2)})
    state = view.get_state(["payload"])["payload"]
    assert state["figure"]["data"]["0"]["y"]["bdata"] == VALUES[0].tobytes()


def test_the_display_data_carry_the_view_for_a_page_without_kernel():
    view = scrub_layers({row: draw(row) for row in range(2)})
    data, _ = view._repr_mimebundle_()
    assert json.loads(json.dumps(data[VIEW_MIME])) == view.payload
    assert "application/vnd.jupyter.widget-view+json" in data


def test_plotly_is_handed_over_once():
    first, second = scrub_layers({0: draw(0)}), scrub_layers({0: draw(1)})
    assert first.plotly is second.plotly
    assert first.plotly.source.startswith(b"/**\n* plotly.js")


def test_numbered_layers_get_a_slider_and_named_ones_a_menu():
    numbered = scrub_layers({3: draw(0), 7: draw(1)}).payload["controls"][0]
    named = scrub_layers({"embedding": draw(0), "output": draw(1)}).payload["controls"][0]
    assert numbered == {"name": "block", "values": ["3", "7"], "menu": False}
    assert named["menu"]


def test_no_figures_are_refused():
    with pytest.raises(ReplibError, match="no figures"):
        scrub_layers({})


def trained(seed: int = 0) -> pd.DataFrame:
    """Settings on a small grid, with rates out of 50."""
    grid = pd.DataFrame(product((0.1, 0.4), (0.0, 3.0), (10.0, 100.0)), columns=["alpha", "beta", "gamma"])
    rates = np.random.default_rng(seed).integers(0, 51, size=(len(grid), 2)) / 50
    return grid.assign(attack=rates[:, 0], harmless=rates[:, 1])


def test_a_response_moves_over_interpolated_places_and_draws_the_trained_ones():
    response = ResponseSurface.fit(trained(), {"attack": 50, "harmless": 50})
    payload = scrub_response(response, about="seed 0").payload
    sizes = [len(control["values"]) for control in payload["controls"]]
    full = [frame for frame in payload["frames"] if None not in frame["at"]]
    assert sizes == [3, 3, 3] and len(full) == 27 and len(payload["frames"]) == 27 + 3 + 9
    assert payload["frames"][0]["at"] == [0, 0, 0]
    view = ResponseView(response, "seed 0")
    for frame in payload["frames"]:
        a, b, c = (index or 0 for index in frame["at"])
        sheets = {"outcomes": view.outcomes((a, b, c)), "maps": view.maps(c), "cross": view.cross(a, b)}
        assert frame["change"]["data"] in sheets.values()
    assert "error where a setting is left out: attack" in payload["figure"]["layout"]["title"]["text"]
