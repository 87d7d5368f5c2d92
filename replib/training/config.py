"""Configuration of a training run: steps, batch, optimiser, LoRA shape, checkpoints and early stopping."""

from __future__ import annotations

from dataclasses import dataclass

from replib.core.errors import ReplibError, check_positive
from replib.models.chat_model import ChatModel


@dataclass(frozen=True)
class TrainConfig:
    """Steps, batch, optimiser and LoRA shape. Defaults suit a small model; RepBend trains 7B at 1e-5, 450 steps."""

    steps: int = 120
    """Optimiser steps."""
    learning_rate: float = 2e-4
    """Peak rate of AdamW."""
    contrasts: int = 16
    """Contrasts a micro-batch, a safe and an unsafe sequence each; as many unpaired answers a side."""
    retain: int = 24
    """Retained dialogues a micro-batch."""
    accumulation: int = 1
    """Micro-batches a step; the loss is their mean."""
    rank: int = 16
    """Rank of LoRA's matrices A and B."""
    lora_alpha: int = 16
    """LoRA scaling: ΔW = lora_alpha / rank · BA."""
    dropout: float = 0.05
    """Share of LoRA's inputs that is zeroed in training."""
    max_grad_norm: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    perturbation: float = 0.0
    """Standard deviation of LoRA-B before the first step, from the seed. At 0 training starts at the base model,
    where only the cosine and the pairing term have a gradient (``replib.defences.repbend.config``)."""
    schedule: str = "constant"
    """Learning-rate schedule, by its name in transformers."""
    first_block: int = 0
    """Lowest block with an adapter. Blocks below run once for model and reference, without gradient."""
    full: bool = False
    """Whether all weights are trained, without LoRA; a frozen copy is the reference."""
    checkpointing: bool = False
    """Whether blocks are recomputed for the gradient: a third more time, a fraction of the memory."""
    request_tokens: int = 512
    """Most tokens of an instruction; longer ones are cut at their end, inside the template."""
    response_tokens: int = 512
    """Most tokens of an answer."""
    max_growth: float | None = None
    """Largest mean norm of safe or unsafe states, as a multiple of the first step's; beyond it training raises
    ``Diverged``. None sets no limit. A loss that is not finite always raises."""
    probe_every: int = 10
    """Steps between validation measurements; the last step is always measured."""
    patience: int | None = None
    """Measurements without a better score before training ends early; None trains all steps."""
    save_every: int = 25
    """Steps between checkpoints, from which the same call resumes; 0 writes none. A checkpoint is four times the size
    of the trained weights. Only the newest is kept, and none after the end."""
    seed: int = 0
    """Seed of the adapter, of dropout and of the order of the rows."""

    def __post_init__(self) -> None:
        names = ("steps", "contrasts", "retain", "accumulation", "rank", "probe_every")
        counts = {name: getattr(self, name) for name in names}
        if bad := [f"{name}={n}" for name, n in counts.items() if n < 1]:
            raise ReplibError(f"{', '.join(bad)}: give 1 or more.")
        check_positive(learning_rate=self.learning_rate)
        if not 0 <= self.dropout < 1:
            raise ReplibError(f"dropout={self.dropout}: give a share from 0 to below 1.")


def said_of_full(model: ChatModel, config: TrainConfig) -> str:
    """Memory note of full training; empty for LoRA."""
    if not config.full:
        return ""
    size = sum(p.numel() * p.element_size() for p in model.causal_lm.parameters())
    return (
        f" All weights are trained: with a frozen copy, gradients and Adam's moments they take {5 * size / 1e9:.1f} GB."
    )
