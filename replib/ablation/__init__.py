"""Ablation of refusal: fitted edits, sweeps over blocks, damage, robustness, localisation."""

from replib.ablation.adaptive_attack import EDIT_ATTACKS, AdaptiveAttack, success_by_block
from replib.ablation.fit import AblationData, Cell, cells_of, fit_edits, grid
from replib.ablation.localisation import onset
from replib.ablation.sweep import Sweeper, best_of, sweep_layers
from replib.ablation.sweep_report import SweepReport, compare_edits, over_fits

__all__ = [
    "EDIT_ATTACKS",
    "AblationData",
    "AdaptiveAttack",
    "Cell",
    "SweepReport",
    "Sweeper",
    "best_of",
    "cells_of",
    "compare_edits",
    "fit_edits",
    "grid",
    "onset",
    "over_fits",
    "success_by_block",
    "sweep_layers",
]
