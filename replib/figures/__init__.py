"""Figures of results and the HTML report; a figure function takes a result or table and returns ``go.Figure``.

========  ==========================================================================================================
layers    clusters, clusters_pair, clusters_grid, layer_curves, distances, divergence, transport_gap
lens      lens_heatmap
training  training_curves, coefficient_sweeps, window_sweep, step_sweep, pareto_settings, coefficient_importance
sweeps    sweep_heatmap, method_curves, first_token_curves, tradeoff, edit_name
audit     audit_success, attack_curves, gap_curves, robustness_curves, sample_curves, edit_parts, token_heatmap,
          predicted_vs_measured, localisation_errors, pareto_defences, pareto_hardening
widgets   scrub_layers, scrub_response
========  ==========================================================================================================

Values that are not finite stay blank. Each figure is legible at a width of 700 px.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # widgets need the extra `notebooks`
