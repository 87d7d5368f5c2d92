"""How long and how fast RepBend trains, and what is said before it does."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from replib.bend import BendConfig


@dataclass(frozen=True)
class TrainConfig:
    """How long and how fast. The defaults suit a small model; the papers' 7B runs used rate 1e-5 and 450 steps."""

    steps: int = 120
    learning_rate: float = 2e-4
    contrasts: int = 16
    """Contrasts a step: as many safe and as many unsafe sequences; where there are unpaired answers, as many again."""
    retain: int = 24
    """Retained dialogues a step."""
    accumulation: int = 1
    """Micro-batches of that size a step; the loss is their mean."""
    rank: int = 16
    lora_alpha: int = 16
    dropout: float = 0.05
    max_grad_norm: float = 1.0
    """Norm to which gradients are clipped; 0 does not clip."""
    perturbation: float = 0.0
    """Standard deviation of LoRA-B before the first step, drawn from the seed. 0 starts at the base model itself, where
    only the cosine and the pairing term have a gradient: see ``replib.bend``."""
    schedule: str = "constant"
    """Learning-rate schedule, by its name in transformers."""
    probe_every: int = 10
    """Steps between validation probes; the last step is always probed."""
    patience: int | None = None
    """Probes without a better score after which training ends; None trains all steps."""
    save_every: int = 25
    """Steps between checkpoints, from which the same call goes on after a kill; 0 writes none. One takes four times the
    room of the weights in training; only the newest is kept, and none after the end."""
    seed: int = 0


def announced(bend: BendConfig, config: TrainConfig, depth: int) -> str:
    """What to know before the first step: target blocks, and what is not in the paper but holds the loss back."""
    layers = bend.layers(depth)
    chosen = "as given" if bend.target_layers else f"by relative depth, 60 to {bend.scope.until:.0%}"
    guards = [
        name if value is True else f"{name} {value:g}"
        for name, value in {"max_distance": bend.max_distance, "relative": bend.relative,
                            "directional": bend.directional, "max_grad_norm": config.max_grad_norm,
                            "patience": config.patience}.items()
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
