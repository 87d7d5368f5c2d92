"""How long and how fast RepBend trains, and what is said before it does."""

from __future__ import annotations

import warnings

from replib.bend import BendConfig
from replib.training.config import TrainConfig


def announced(bend: BendConfig, config: TrainConfig, depth: int) -> str:
    """What to know before the first step: target blocks, and what is not in the paper but holds the loss back."""
    layers = bend.layers(depth)
    chosen = "as given" if bend.target_layers else f"by relative depth, 60 to {bend.scope.until:.0%}"
    guards = [
        name if value is True else f"{name} {value:g}"
        for name, value in {"max_distance": bend.max_distance, "relative": bend.relative,
                            "directional": bend.directional, "max_grad_norm": config.max_grad_norm,
                            "max_growth": config.max_growth, "patience": config.patience}.items()
        if value
    ]  # fmt: skip
    fidelity = "a scope of its own" if bend.custom else f"{bend.fidelity} fidelity"
    return (f"RepBend ({fidelity}) bends blocks {', '.join(map(str, layers))} of {depth} ({chosen}). "
            f"Safeguards: {', '.join(guards) or 'none'}.")  # fmt: skip


def warn_of_the_start(bend: BendConfig, config: TrainConfig) -> None:
    """Warn where no term has a gradient at LoRA's start; see ``replib.bend``."""
    if not bend.escapes and not config.perturbation:
        warnings.warn(
            "beta and eta are 0: at LoRA's start no term has a gradient, so the first step follows rounding noise and "
            "differs between machines. Set beta above 0, or TrainConfig(perturbation=1e-3).",
            stacklevel=3,
        )
