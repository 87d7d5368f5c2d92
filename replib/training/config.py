"""How long and how fast RepBend trains, and what is said before it does."""

from __future__ import annotations

from dataclasses import dataclass

from replib.core.errors import ReplibError, check_positive
from replib.models.chat_model import ChatModel


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
    only the cosine and the pairing term have a gradient: see ``replib.defences.repbend.config``."""
    schedule: str = "constant"
    """Learning-rate schedule, by its name in transformers."""
    first_block: int = 0
    """Lowest block with an adapter. Those below are read once for model and reference, and no gradient goes there."""
    full: bool = False
    """Whether all weights are trained, without LoRA; a frozen copy then stays in memory as the reference."""
    checkpointing: bool = False
    """Whether blocks are computed anew for the gradient: a third more time for a fraction of the memory."""
    request_tokens: int = 512
    """Tokens of an instruction at most; longer ones lose their end, the template around them stays whole."""
    response_tokens: int = 512
    """Tokens of an answer at most."""
    max_growth: float | None = None
    """Training ends with an error where the mean norm of safe or unsafe states is more than so many times what it was
    at the first step; None lets them grow. A loss that is no number always ends it."""
    probe_every: int = 10
    """Steps between validation probes; the last step is always probed."""
    patience: int | None = None
    """Probes without a better score after which training ends; None trains all steps."""
    save_every: int = 25
    """Steps between checkpoints, from which the same call goes on after a kill; 0 writes none. One takes four times the
    room of the weights in training; only the newest is kept, and none after the end."""
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("steps", "contrasts", "retain", "accumulation", "rank", "probe_every")
        counts = {name: getattr(self, name) for name in names}
        if bad := [f"{name}={n}" for name, n in counts.items() if n < 1]:
            raise ReplibError(f"{', '.join(bad)}: give one at least.")
        check_positive(learning_rate=self.learning_rate)
        if not 0 <= self.dropout < 1:
            raise ReplibError(f"dropout={self.dropout}: give a share from 0 to below 1.")


def said_of_full(model: ChatModel, config: TrainConfig) -> str:
    """What training all weights takes, before it is taken; nothing for LoRA."""
    if not config.full:
        return ""
    size = sum(p.numel() * p.element_size() for p in model.causal_lm.parameters())
    return (
        f" All weights are trained: with a frozen copy, gradients and Adam's moments they take {5 * size / 1e9:.1f} GB."
    )
