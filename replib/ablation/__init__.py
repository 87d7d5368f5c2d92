"""Ablation of refusal: fitted edits, sweeps over blocks, damage, robustness, localisation."""

from replib.ablation.adaptive_attack import EDIT_ATTACKS, AdaptiveAttack
from replib.ablation.fit import AblationData, Cell, fit_edits, grid
from replib.ablation.sweep import Sweeper, best_of, sweep_layers

__all__ = [
    "EDIT_ATTACKS",
    "AblationData",
    "AdaptiveAttack",
    "Cell",
    "Sweeper",
    "best_of",
    "fit_edits",
    "grid",
    "sweep_layers",
]
