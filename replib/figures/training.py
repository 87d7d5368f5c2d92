"""Figures of trainings: a run step by step, outcomes over coefficients, Pareto fronts, importance of coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from replib.core.errors import ReplibError
from replib.core.stats import Measured, Numbers, numbers
from replib.defences.tuning import pareto
from replib.experiments.response_surface import COEFFICIENTS, CoefficientSweep, ResponseSurface
from replib.figures.response import GREEK
from replib.figures.style import BLUE, DASHES, GREY, INK, SKY, VERMILLION, apply_style, faint, safe, styled
from replib.figures.traces import as_measured, case_note, curve_lines, join_notes, measured_only, need, whiskers
from replib.training.result import TrainResult

_SHOWN = ("attack", "prefill", "harmless", "borderline")
_LABELLED = 8  # points that can be labelled without overlap; more are named on hovering
_TERMS: dict[str, dict[str, str]] = {
    "distance moved": {"safe": "safe", "unsafe": "unsafe"},
    "residual norm": {"safe_norm": "safe answers", "unsafe_norm": "unsafe answers"},
    "KL (nats a token)": {"kl": "benign answers", "retain_kl": "benign answers"},
    "mean cosine": {"cosine": "unsafe prompts"},
    "loss (nats a token)": {"hardening": "refusals under edits"},
}
"""Panel -> logged term -> name of its curve."""


def training_curves(result: TrainResult) -> go.Figure:
    """Loss terms, norms and validation probe of a run by step, with the chosen step marked."""
    history = result.history.set_index("step")
    probes = result.probes.set_index("step").reindex(history.index.union([0]))
    history = history.reindex(probes.index)
    panels: dict[str, dict[str, Any]] = {
        title: {name: history[term] for term, name in names.items() if term in history}
        for title, names in _TERMS.items()
        if set(names) & set(history)
    } or {"loss": {"loss": history["loss"]}}
    if len(probes.columns):
        panels["validation rate"] = {name: probes[name] for name in probes.columns}
    return _step_panels(panels, steps=probes.index.to_numpy(), chosen=result.step)


def coefficient_sweeps(results: CoefficientSweep, when: str = "last") -> go.Figure:
    """Outcomes over each coefficient, the others as in the preset, or elsewhere as thin lines."""
    table = results.at(when)
    alike = results.like_preset(table, *COEFFICIENTS)
    panels = {GREEK[c]: _sweep_of(results, alike, c, [x for x in COEFFICIENTS if x != c]) for c in COEFFICIENTS}
    return _sensitivity(panels, "Outcomes over each coefficient, the others as in the preset", _read_at(results, when))


def window_sweep(results: CoefficientSweep, when: str = "last") -> go.Figure:
    """Outcomes over windows of target blocks, a panel for each alpha with several trained windows."""
    rows = results.like_preset(results.at(when), "alpha", "layers")
    several = rows.groupby("alpha")["layers"].nunique()
    panels = {
        f"α {alpha:g}": _sweep_of(results, rows[rows.alpha == alpha], "layers", [])
        for alpha in several.index[several > 1]
    }
    return _sensitivity(panels, "Outcomes over target blocks, all else as in the preset", _read_at(results, when))


def step_sweep(results: CoefficientSweep) -> go.Figure:
    """Outcomes over the steps of one run, a panel for each length of the schedule."""
    rows = results.like_preset(results.table, "steps")
    panels = {f"{steps} steps": _sweep_of(results, run, "step", []) for steps, run in rows.groupby("steps")}
    note = f"in each run the learning rate falls to zero at its last step ({results.about['schedule']})"
    return _sensitivity(panels, "Outcomes over training steps, all else as in the preset", note)


def pareto_settings(results: CoefficientSweep, benign: str = "harmless", when: str = "last") -> go.Figure:
    """Attack success against a benign rate, a point a trained setting."""
    rows = results.at(when)
    names = [
        f"α {r.alpha:g}, β {r.beta:g}, γ {r.gamma:g}, blocks {r.layers}, step {r.step} of {r.steps}, seed {r.seed}"
        for r in rows.itertuples()
    ]
    both = (results.measured(rows, rate) for rate in ("attack", benign))
    return pareto_front(*both, names=names, title=f"Attack success against {benign} compliance")


def coefficient_importance(response: ResponseSurface) -> go.Figure:
    """Share of the variance of each outcome that each coefficient explains, over the trained box."""
    shares = response.shares()
    estimator = "Sobol indices of the interpolated rates, coefficients independent and uniform in log(1 + c / c0)"
    return _importance({name: shares[name] for name in _SHOWN}, estimator=estimator)


def pareto_front(
    success: Measured, benign: Measured, *, names: Sequence[str], title: str = "", listed: bool = False
) -> go.Figure:
    """Attack success (low is safe) against benign compliance (high is useful), with the front.

    Args:
        success: [points] attack success.
        benign: [points] compliance with harmless or borderline requests.
        names: [points] labels of up to eight points; more are shown on hovering.
        title: title of the figure.
        listed: list all names in a column beside the points and draw all bars, for about a dozen points.

    Raises:
        ReplibError: there are no points, or not one name a point.
    """
    need(names, "pareto_front", "points")
    table = pd.DataFrame({"attack": numbers(success.value), "benign": numbers(benign.value)})
    if len(table) != len(names):
        raise ReplibError(f"pareto_front got {len(table)} points and {len(names)} names. Pass one name a point.")
    best = pareto(table, minimise=["attack"], maximise=["benign"])
    front = best.drop_duplicates().sort_values("benign")
    figure = go.Figure()
    figure.add_scatter(x=front.benign, y=front.attack, mode="lines", name="front: no other point is better in both",
                       line={"color": INK, "dash": "dot", "width": 1.5, "shape": "vh"}, hoverinfo="skip")  # fmt: skip
    few, on = listed or len(names) <= _LABELLED, table.index.isin(best.index)
    for name, rows, colour in (("beaten by another", ~on, GREY), ("on the front", on, BLUE)):
        barred = bool(rows.any()) and (few or rows is on)  # bars of many points would hide the points
        figure.add_trace(_points_of(success, benign, names, rows, barred=barred).update(name=name, marker_color=colour))
    if listed:
        figure.update_traces(mode="markers", selector={"mode": "markers+text"})
    left = float(np.nanmin(numbers(benign.value if benign.low is None else benign.low)))
    figure.update_xaxes(title_text="benign compliance", tickformat=".0%", range=[left - 0.04, 1.01 + 0.03 * (1 - left)])
    figure.update_yaxes(title_text="attack success", tickformat=".0%", range=[-0.04, 1.06])
    if listed:
        _list_names(figure, table, names)
    bars = "" if success.low is None else "bars: 95 % intervals" + ("" if few else ", of the front alone")
    note = join_notes(case_note([success, benign]), bars)
    return apply_style(figure, title or "Attack success against benign compliance", note, height=480)


def _list_names(figure: go.Figure, table: pd.DataFrame, names: Sequence[str]) -> None:
    """List the names on the right, near the height of their points, each with a line to its point."""
    gap, place = 0.075, -1.0
    left = figure.layout.xaxis.range[0]
    column = 1 + 0.06 * (1 - left)
    for i in table.sort_values(["attack", "benign"], ascending=[True, False]).index:
        place = max(float(table.attack[i]), place + gap)
        figure.add_annotation(x=table.benign[i], y=table.attack[i], ax=column, ay=place, axref="x", ayref="y",
                              text=safe(names[i]), xanchor="left", showarrow=True, arrowhead=0, arrowwidth=1,
                              arrowcolor=faint(INK, 0.3), font={"size": 12, "color": INK})  # fmt: skip
    figure.update_xaxes(range=[left, 1 + 0.42 * (1 - left)], tickvals=[x / 20 for x in range(21)])
    figure.update_yaxes(range=[-0.04, max(1.06, place + gap)], tickvals=[x / 5 for x in range(6)])


def _points_of(
    success: Measured, benign: Measured, names: Sequence[str], rows: np.ndarray, *, barred: bool
) -> go.Scatter:
    """Points of ``rows`` with their rates on hovering, and labels if they are few."""
    places = np.flatnonzero(rows).astype(np.intp)
    hover = [
        f"{safe(names[i])}<br>attack success {success.words()[i]}<br>benign compliance {benign.words()[i]}"
        for i in places.tolist()
    ]
    colour = faint(INK, 0.35)
    return go.Scatter(
        x=numbers(benign.value)[places],
        y=numbers(success.value)[places],
        error_x=whiskers(benign, places, colour) if barred else {},
        error_y=whiskers(success, places, colour) if barred else {},
        mode="markers+text" if len(names) <= _LABELLED else "markers",
        text=[safe(names[i]) for i in places.tolist()],
        textposition="top left",
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        marker={"size": 9},
        cliponaxis=False,
    )


def _step_panels(
    panels: Mapping[str, Mapping[str, Measured | Numbers]],
    *,
    steps: Numbers,
    chosen: int | None = None,
) -> go.Figure:
    """Panels above each other on one step axis.

    Args:
        panels: vertical axis with its unit -> name -> [steps]; NaN where a probe did not run.
        steps: [steps] the step numbers.
        chosen: the step that the validation probe chose.
    """
    need(panels, "training_curves", "panels")
    rows = len(panels)
    figure = make_subplots(rows, 1, shared_xaxes=True, vertical_spacing=0.16 / rows)
    for row, (unit, curves) in enumerate(panels.items(), start=1):
        legend = f"legend{row + 1}"  # `legend` itself is below the figure
        for name, curve, colour, used in styled(curves.items()):
            probed = measured_only(as_measured(curve), np.asarray(steps, np.float64))
            lines = curve_lines(probed, name, colour, dash=DASHES[used % len(DASHES)], axis="step")
            figure.add_traces([line.update(legend=legend) for line in lines], rows=row, cols=1)
        figure.update_yaxes(title_text=safe(unit), row=row)
        top = next(figure.select_yaxes(row=row)).domain[1]
        place = {"orientation": "v", "x": 1.01, "xref": "paper", "y": top, "yref": "paper", "yanchor": "top"}
        figure.update_layout({legend: place})
    if chosen is not None:
        figure.add_vline(chosen, line={"color": INK, "dash": "dot", "width": 1.5})
    figure.update_xaxes(title_text="step", row=rows)
    note = "" if chosen is None else f"dotted: step {chosen}, chosen on the validation prompts"
    return apply_style(figure, "Training terms and validation probe by step", note, height=110 + 165 * rows)


@dataclass(frozen=True)
class _Sweep:
    """Outcomes over one varied value."""

    values: Sequence[str]
    """Settings in order, evenly spaced on the axis."""
    curves: Mapping[str, Measured]
    """Outcome -> [values]."""
    linked: bool = field(default=True, kw_only=True)
    """Connect the values by lines; false for names."""
    others: Sequence[Numbers] = field(default=())
    """First outcome at other settings of the other values: [values] each, NaN where not trained."""


def _sweep_of(results: CoefficientSweep, table: pd.DataFrame, name: str, others: Sequence[str]) -> _Sweep:
    """Rows of a table over one of its columns; rows that differ in ``others`` make the thin lines."""
    values = sorted(table[name].unique(), key=lambda v: [*map(int, v.split("-"))] if isinstance(v, str) else [v])
    rows = results.like_preset(table, name) if others else table
    rows = rows.set_index(name).sort_index(key=lambda index: [values.index(v) for v in index])
    curves = {rate: _placed(results, rows, rate, values) for rate in _SHOWN}
    thin = []
    if others:
        wide = table.pivot(index=others, columns=name, values=_SHOWN[0]).reindex(columns=values)
        thin = [*wide[wide.notna().sum(axis=1) > 1].to_numpy()]
    words = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    return _Sweep(words, curves, thin, linked=name != "layers")


def _placed(results: CoefficientSweep, rows: pd.DataFrame, rate: str, values: Sequence[Any]) -> Measured:
    """A rate of rows, each at the place of its value among all values."""
    return replace(results.measured(rows, rate), at=[values.index(v) for v in rows.index])


def _read_at(results: CoefficientSweep, when: str) -> str:
    step = "last step" if when == "last" else "step chosen by the probe"
    return f"at the {step}, one run a point, seed {results.about['preset']['seed']}"


def _sensitivity(panels: Mapping[str, _Sweep], title: str, note: str) -> go.Figure:
    """Sweeps side by side with 95 % intervals, as Figs 5 to 7 of arXiv 2504.01550. panels: varied value -> sweep."""
    need(panels, "coefficient_sweeps", "sweeps")
    figure = make_subplots(
        1, len(panels), shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=[safe(name) for name in panels]
    )
    for column, sweep in enumerate(panels.values(), start=1):
        figure.add_traces(_sweep_lines(sweep, legend=column == 1), rows=1, cols=column)
        figure.update_xaxes(
            tickvals=[*range(len(sweep.values))], ticktext=[safe(v) for v in sweep.values], tickfont_size=11, col=column
        )
    figure.update_yaxes(range=[-0.04, 1.04], tickformat=".0%").update_yaxes(title_text="complied", col=1)
    curves = [curve for sweep in panels.values() for curve in sweep.curves.values()]
    thin = f"thin: {safe(next(iter(next(iter(panels.values())).curves)))} at other settings"
    some = any(len(sweep.others) for sweep in panels.values())
    linked = any(sweep.linked for sweep in panels.values())
    intervals = f"{'bands' if linked else 'bars'}: Wilson 95 %"
    text = join_notes(case_note(curves), intervals, thin if some else "", note)
    return apply_style(figure, title, text, height=430)


def _sweep_lines(sweep: _Sweep, *, legend: bool) -> list[go.Scatter]:
    places = np.arange(len(sweep.values))
    traces = []
    for other in sweep.others:
        known = np.isfinite(numbers(other))
        thin = {"color": faint(VERMILLION, 0.3), "width": 1}
        traces.append(
            go.Scatter(x=places[known], y=numbers(other)[known], mode="lines", line=thin, hoverinfo="skip",
                       showlegend=False)
        )  # fmt: skip
    for name, curve, colour, used in styled(sweep.curves.items()):
        lines = curve_lines(curve, name, colour, dash=DASHES[used % len(DASHES)], axis="setting", banded=sweep.linked)
        if not sweep.linked:
            lines[0].update(mode="markers", marker_size=9, error_y=whiskers(curve, slice(None), colour))
        traces += [line.update(showlegend=legend and bool(line.showlegend)) for line in lines]
    return traces


def _importance(shares: Mapping[str, pd.DataFrame], *, estimator: str) -> go.Figure:
    """Bars of variance shares, a panel an outcome, a row a coefficient.

    Args:
        shares: outcome -> table with columns ``alone`` and ``total`` (with others).
        estimator: estimator of the shares and its range.
    """
    need(shares, "coefficient_importance", "outcomes")
    titles = [safe(name) + ("" if table.to_numpy().any() else ": does not vary") for name, table in shares.items()]
    figure = make_subplots(1, len(shares), shared_yaxes=True, subplot_titles=titles)
    for column, table in enumerate(shares.values(), start=1):
        shown = {"alone": (table["alone"], BLUE), "with others": (table["total"] - table["alone"], SKY)}
        for name, (values, colour) in shown.items():
            figure.add_bar(x=values, y=[*table.index], orientation="h", name=name, legendgroup=name,
                           marker_color=colour, showlegend=column == 1, row=1, col=column,
                           hovertemplate=f"%{{y}}, {name}: %{{x:.0%}}<extra></extra>")  # fmt: skip
    figure.update_xaxes(range=[0, 1.02], tickvals=[0, 0.5, 1], tickformat=".0%", title_text="of the variance")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_layout(barmode="stack")
    return apply_style(figure, "Importance of each coefficient", estimator, height=330)
