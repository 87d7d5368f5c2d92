"""Figures, widgets and the report."""

from replib.figures.audit import (
    audit_success,
    gap_profiles,
    hardening_blocks,
    hardening_frontier,
    localisation_errors,
    pareto_defences,
    predicted_vs_measured,
    robustness_curves,
    sample_curves,
    shares,
    success_by_block,
    token_depths,
)
from replib.figures.layers import by_block, clusters, clusters_grid, clusters_pair, distances, divergence, transport_gap
from replib.figures.lens import lens_grid, lens_pair
from replib.figures.sweeps import cheap, edit_name, methods, sweep, tradeoff
from replib.figures.training import (
    coefficient_sweeps,
    pareto_settings,
    step_curves,
    training_history,
    variance_shares,
    window_sweep,
)

__all__ = [
    "audit_success",
    "by_block",
    "cheap",
    "clusters",
    "clusters_grid",
    "clusters_pair",
    "coefficient_sweeps",
    "distances",
    "divergence",
    "edit_name",
    "gap_profiles",
    "hardening_blocks",
    "hardening_frontier",
    "lens_grid",
    "lens_pair",
    "localisation_errors",
    "methods",
    "pareto_defences",
    "pareto_settings",
    "predicted_vs_measured",
    "robustness_curves",
    "sample_curves",
    "shares",
    "step_curves",
    "success_by_block",
    "sweep",
    "token_depths",
    "tradeoff",
    "training_history",
    "transport_gap",
    "variance_shares",
    "window_sweep",
]
