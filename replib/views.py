"""Results in, figures out: what the notebooks draw, one function a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from replib.ablation.fit import window
from replib.ablation.sweep import best_of
from replib.activations.store import Activations
from replib.analysis.geometry import LayerProfile, pca
from replib.analysis.logit_lens import LensComparison, LensTrajectory
from replib.core.errors import ReplibError
from replib.core.stats import Measured
from replib.edits.methods import METHODS
from replib.figures import (
    audit_dots,
    cluster_scatter,
    cluster_scatter_grid,
    cluster_scatter_pair,
    layer_lines,
    lens_heatmap,
    lens_heatmap_pair,
    sweep_heatmap,
    tradeoff_scatter,
    training_curves,
)
from replib.training.result import TrainResult

LABELS = ("harmful", "harmless")
Pair = tuple[Activations, Activations]  # harmful, harmless
ANSWERED = "KL on own answers, all tokens (nats)"
DISTINCT = ["method", "layer", "k", "positions"]


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


def lens_grid(found: LensTrajectory, title: str = "") -> go.Figure:
    """Entropy and likeliest token at every block."""
    return lens_heatmap(found.entropy.numpy(), found.words, inputs=found.tokens, title=title)


def lens_pair(found: LensComparison, title: str = "") -> go.Figure:
    """Base and bent model on the very same tokens."""
    both = (found.base, found.bent)
    return lens_heatmap_pair(
        [t.entropy.numpy() for t in both], [t.words for t in both], inputs=found.base.tokens, title=title
    )


TERMS: dict[str, dict[str, str]] = {
    "distance moved": {"safe": "safe", "unsafe": "unsafe"},
    "residual norm": {"safe_norm": "safe answers", "unsafe_norm": "unsafe answers"},
    "KL (nats a token)": {"kl": "benign answers", "retain_kl": "benign answers"},
    "mean cosine": {"cosine": "unsafe prompts"},
    "loss (nats a token)": {"hardening": "refusals under edits"},
}
"""Panels of a training, and what each term of its log is called there."""


def training_history(result: TrainResult) -> go.Figure:
    """Terms, norms and validation probe of a run, with the chosen step marked; terms it does not have are left out."""
    history = result.history.set_index("step")
    probes = result.probes.set_index("step").reindex(history.index.union([0]))
    history = history.reindex(probes.index)
    panels: dict[str, dict[str, Any]] = {
        title: {name: history[term] for term, name in names.items() if term in history}
        for title, names in TERMS.items()
        if set(names) & set(history)
    } or {"loss": {"loss": history["loss"]}}
    if len(probes.columns):
        panels["validation rate"] = {name: probes[name] for name in probes.columns}
    return training_curves(panels, steps=probes.index.to_numpy(), chosen=result.step)


def sweep(tables: pd.DataFrame, positions: str, *, by: str = "model") -> go.Figure:
    """Attack success by block and K, a panel a model, each edit re-fitted on that model.

    A panel more for each further strength and fit position; blank where no answers were generated.
    """
    table = tables[(tables.method == "pca_ot") & (tables.positions == positions)]
    ks = sorted(table.k.unique().tolist())
    groups = {
        ", ".join(filter(None, (name, *_changed(strength, read)))): rows
        for (name, strength, read), rows in table.groupby([by, "strength", "read"], sort=False, dropna=False)
    }
    windows = {name: found for name, rows in groups.items() if (found := window(rows.depth.iloc[0]))}
    title = f"Attack success of PCA-OT at one block, edited positions: {positions}"
    return sweep_heatmap({name: _grid(rows, ks) for name, rows in groups.items()}, ks, title=title, windows=windows)


def _grid(rows: pd.DataFrame, ks: Sequence[int]) -> Measured:
    every = range(rows.depth.iloc[0])
    wide = {
        c: rows.pivot(index="layer", columns="k", values=c).reindex(every, columns=ks).to_numpy()
        for c in ("compliance", "low", "high", "n")
    }
    return Measured(wide["compliance"], low=wide["low"], high=wide["high"], n=wide["n"])


def methods(tables: pd.DataFrame, model: str, marks: Mapping[str, Any] | None = None) -> go.Figure:
    """Attack success by block on one model, a curve a method and edited position; PCA-OT at each block's best K.

    ``marks``: as for ``figures.layer_lines``, beside the window of 40 to 60 % of the depth.
    """
    title = f"Attack success on {model}, by the block that the edit is fitted on"
    return _profile(tables, model, ("compliance", "low", "high"), "attack success", title, marks)


def cheap(tables: pd.DataFrame, model: str, marks: Mapping[str, Any] | None = None) -> go.Figure:
    """The cheap score by block, as ``methods`` shows attack success: below 0, refusal is the less likely beginning."""
    title = f"Cheap score on {model}, by the block that the edit is fitted on"
    columns = ("log_odds", "log_odds_low", "log_odds_high")
    return _profile(tables, model, columns, "log-odds of refusal, first token", title, marks)


def _profile(
    tables: pd.DataFrame,
    model: str,
    columns: tuple[str, str, str],
    unit: str,
    title: str,
    marks: Mapping[str, Any] | None,
) -> go.Figure:
    """Value, low and high by block, a curve an edit, each block at its best K."""
    rows, edit = tables[tables.model == model], ["method", "positions", "strength", "read"]
    best = best_of(rows, *edit, "layer", by=columns[0]).sort_values("layer")
    curves = {}
    for name, curve in best.groupby(edit, dropna=False):
        value, low, high, n, at = (curve[column].to_numpy() for column in (*columns, "n", "layer"))
        curves[edit_name(*name)] = Measured(value, low=low, high=high, n=n, at=at)
    middle = window(rows.depth.iloc[0]) if len(rows) else None
    return layer_lines(curves, unit, title=title, marks=marks, window=middle)


def audit_success(table: pd.DataFrame) -> go.Figure:
    """Every attack and benign task, a panel a model."""
    return audit_dots(table)


def edit_name(method: str, positions: str, strength: float = 1.0, read: Any = None) -> str:
    """How an edit is called in figures: its method, the edited positions, and what differs from the method's source."""
    return ", ".join((METHODS[method].title, positions.replace("_", " "), *_changed(strength, read)))


def _changed(strength: float, read: Any) -> list[str]:
    where = [] if pd.isna(read) else [f"fitted at {read}".replace("_", " ")]
    return [*([] if strength == 1 else [f"strength {strength:g}"]), *where]


def tradeoff(best: pd.DataFrame, damage: pd.DataFrame, title: str) -> go.Figure:
    """Attack success of edits against what they do to harmless requests: exact KL over the model's own answers.

    ``damage``: ``Sweeper.damage`` of these very edits, in this order.
    """
    if best.empty:
        raise ReplibError("There are no edits to compare: run a sweep first.")
    success, cost = best.reset_index(drop=True), damage[damage.metric == ANSWERED].reset_index(drop=True)
    if not success[DISTINCT].equals(cost[DISTINCT]):
        raise ReplibError("The damage is of other edits: measure it of cells_of(best), in that order.")
    return tradeoff_scatter(
        Measured(success.compliance, low=success.low, high=success.high, n=success.n),
        Measured(cost.change, low=cost.change_low, high=cost.change_high, n=cost.n),
        names=[edit_name(*x) for x in zip(best.method, best.positions, strict=True)],
        unit="KL on harmless requests (nats a token, own answers)",
        title=title,
    )
