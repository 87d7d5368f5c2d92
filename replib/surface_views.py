"""Trained settings and searches in, figures out: what each coefficient does, what is bought and what is paid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from replib.ablation.adaptive_attack import ASSAULTS
from replib.coefficient_figures import Sweep, importance, pareto_front, sensitivity
from replib.core.stats import Measured
from replib.defences.tuning import Tuning
from replib.experiments.comparison_results import MEASURES, Hardness, Standings
from replib.experiments.response_surface import COEFFICIENTS, Response, Surface
from replib.figures import layer_lines

GREEK = {"alpha": "α", "beta": "β", "gamma": "γ"}
SHOWN = ("attack", "prefill", "harmless", "borderline")


def coefficient_sweeps(surface: Surface, when: str = "last") -> go.Figure:
    """Outcomes over one coefficient at a time, the others as in the preset; thin lines: others elsewhere."""
    table = surface.at(when)
    alike = surface.like_preset(table, *COEFFICIENTS)
    panels = {GREEK[c]: _swept(surface, alike, c, [x for x in COEFFICIENTS if x != c]) for c in COEFFICIENTS}
    return sensitivity(
        panels, title="What each coefficient does, the others as in the preset", note=_read_at(surface, when)
    )


def window_sweep(surface: Surface, when: str = "last") -> go.Figure:
    """Outcomes over windows of target blocks, a panel an alpha at which several windows were trained."""
    rows = surface.like_preset(surface.at(when), "alpha", "layers")
    several = rows.groupby("alpha")["layers"].nunique()
    panels = {
        f"α {alpha:g}": _swept(surface, rows[rows.alpha == alpha], "layers", []) for alpha in several.index[several > 1]
    }
    return sensitivity(panels, title="Which blocks are bent, all else as in the preset", note=_read_at(surface, when))


def step_curves(surface: Surface) -> go.Figure:
    """Outcomes over the steps of one run, a panel a length of the schedule, all else as in the preset."""
    rows = surface.like_preset(surface.table, "steps")
    panels = {f"{steps} steps": _swept(surface, run, "step", []) for steps, run in rows.groupby("steps")}
    note = f"in each run the rate falls to zero at its last step ({surface.about['schedule']})"
    return sensitivity(panels, title="How long is trained", note=note)


def pareto_settings(surface: Surface, benign: str = "harmless", when: str = "last") -> go.Figure:
    """Every trained setting: attack success against a benign rate."""
    rows = surface.at(when)
    names = [
        f"α {r.alpha:g}, β {r.beta:g}, γ {r.gamma:g}, blocks {r.layers}, step {r.step} of {r.steps}, seed {r.seed}"
        for r in rows.itertuples()
    ]
    both = (surface.measured(rows, rate) for rate in ("attack", benign))
    return pareto_front(*both, names=names, title=f"Attack success against {benign} compliance")


def pareto_defences(found: Standings, against: str = "benign") -> go.Figure:
    """The defences: mean attack success against what is left of a rate that ought to stay high."""
    both = (found.measured(rate) for rate in ("attack", against))
    title = f"Defences on the test split: attack success against {MEASURES[against]}"
    figure = pareto_front(*both, names=found.titles, title=title, listed=True)
    return figure.update_xaxes(title_text=MEASURES[against])


def hardening_frontier(found: Hardness) -> go.Figure:
    """Hardened and other models: the most successful attack of the goal against what is left of benign answers."""
    both = found.measured_worst(), found.measured("benign")
    title = "The most successful of all re-fitted edits and prefill, against harmless and borderline answers"
    figure = pareto_front(*both, names=found.titles, title=title, listed=True)
    return figure.update_xaxes(title_text=MEASURES["benign"])


def hardening_blocks(found: Hardness, assault: str = "ot_all") -> go.Figure:
    """Success of one way to edit refusal away by block, each block at its best K, a curve a defence."""
    title = f"{ASSAULTS[assault].title}: success by block, best of K = {found.ks(assault)}"
    return layer_lines(found.by_block(assault), "attack success", title=title)


def variance_shares(response: Response) -> go.Figure:
    """Which coefficient moves attack success and benign compliance, over the box that was trained."""
    found = response.shares()
    estimator = "Sobol indices of the interpolated rates, coefficients independent and uniform in log(1 + c / c0)"
    return importance({name: found[name] for name in SHOWN}, estimator=estimator)


def tuning(found: Tuning) -> go.Figure:
    """Trials of a search: attack success against harmless compliance."""
    t = found.table
    names = [
        f"trial {r.trial}: α {r.alpha:.3g}, β {r.beta:.3g}, γ {r.gamma:.3g}, KL {r.kl:.2g}" for r in t.itertuples()
    ]
    success, benign = Measured(t.attack_success), Measured(t.harmless_compliance)
    return pareto_front(success, benign, names=names, title=f"{len(t)} trials of the search")


def _swept(surface: Surface, table: pd.DataFrame, name: str, others: Sequence[str]) -> Sweep:
    """Rows of a table over one of its columns; ``others`` are free to differ and make the thin lines."""
    values = sorted(table[name].unique(), key=lambda v: [*map(int, v.split("-"))] if isinstance(v, str) else [v])
    rows = surface.like_preset(table, name) if others else table
    rows = rows.set_index(name).sort_index(key=lambda found: [values.index(v) for v in found])
    curves = {rate: _placed(surface, rows, rate, values) for rate in SHOWN}
    thin = []
    if others:
        wide = table.pivot(index=others, columns=name, values=SHOWN[0]).reindex(columns=values)
        thin = [*wide[wide.notna().sum(axis=1) > 1].to_numpy()]
    words = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    return Sweep(words, curves, thin, linked=name != "layers")


def _placed(surface: Surface, rows: pd.DataFrame, rate: str, values: Sequence[Any]) -> Measured:
    """A rate of some rows, each at the place of its value among all values."""
    return replace(surface.measured(rows, rate), at=[values.index(v) for v in rows.index])


def _read_at(surface: Surface, when: str) -> str:
    step = "last step" if when == "last" else "step that the probe kept"
    return f"at the {step}, one run a point, seed {surface.about['preset']['seed']}"
