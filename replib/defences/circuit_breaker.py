"""Circuit Breaker, Zou et al. 2024 (arXiv 2406.04313): representations of unsafe dialogues are rerouted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError, check_blocks, check_coefficients
from replib.data.mixtures import check_lists
from replib.data.prompts import Dialogue
from replib.defences.losses import (
    BlockStates,
    StatePair,
    beside_reference,
    block_at_depth,
    block_outputs,
    dialogue_batch,
    distance,
    widened,
)
from replib.models.chat_model import ChatModel
from replib.models.tokens import Batch
from replib.training.config import TrainConfig
from replib.training.objective import Lora, Objective, Part


def rerouting(harmful: StatePair) -> Float[Tensor, ""]:
    """Mean ReLU(cos(h', h)) over layers and tokens; 0 once no state has a positive cosine with its old direction."""
    return F.cosine_similarity(*widened(harmful), dim=-1).relu().mean()


def breaker_schedule(progress: float, *, alpha: float = 10.0) -> tuple[float, float]:
    """Weights (c_r, c_s) = (α p/2, α (1 − p/2)) of retaining and rerouting after a share p of training.

    Raises:
        ReplibError: p lies outside 0 to 1.
    """
    if not 0 <= progress <= 1:
        raise ReplibError(f"progress={progress} lies outside 0 to 1: give the finished share of training.")
    return alpha * progress / 2, alpha * (1 - progress / 2)


@dataclass(frozen=True)
class CircuitBreaker(Objective):
    """Circuit breaking by representation rerouting, Zou et al. 2024 (arXiv 2406.04313), Algorithm 1.

    L = c_r mean ‖h'(retain) − h‖₂ + c_s mean ReLU(cos(h'(unsafe), h)),  c_r = α p/2,  c_s = α (1 − p/2)

    p is the finished share of training. Means run over layers and over all tokens of the dialogues, prompts included;
    the source divides the retain term by padding too. Defaults are the official ones for Llama-3-8B (α 10, Mistral 5;
    150 steps, rate 1e-4, batch 16, LoRA of rank 16 with dropout 0.05); RepBend's comparison has α = 15 and 200 steps.

    As in the source, the model ends one block above the highest rerouted layer. LoRA adapts all blocks up to there,
    and all hidden states up to there are retained: the embeddings, which never move, and the last output after the
    final norm. The source's layers 10 and 20 are hidden states, the outputs of blocks 9 and 19.

    At LoRA's start h' = h, the cosine is at its maximum and the distance at its kink; neither has a gradient.
    """

    name = "Circuit Breaker"
    alpha: float = 10.0
    """Weight of both terms together."""
    layers: tuple[int, ...] = ()
    """Blocks whose outputs are rerouted; () takes the depths of blocks 9 and 19 of 32."""
    relative: bool = False
    """Whether retained distances are divided by the base norm. Ours: a cosine has no scale, a distance has one. On a
    model with long states the retain term outweighs rerouting from the first step on."""

    def __post_init__(self) -> None:
        check_coefficients(alpha=self.alpha)

    def blocks(self, depth: int) -> tuple[int, ...]:
        """Rerouted blocks in a model of ``depth`` blocks; ReplibError if one does not exist."""
        blocks = self.layers or tuple(sorted({block_at_depth(10, depth), block_at_depth(20, depth)}))
        check_blocks(blocks, depth)
        return blocks

    def top(self, depth: int) -> int:
        """Last adapted and retained block."""
        return min(max(self.blocks(depth)) + 1, depth - 1)

    def check(self, chat: ChatModel, data: Any) -> None:
        """Both lists must be filled, and the blocks must exist."""
        check_lists(self.name, data, "unsafe", "retain")
        self.blocks(chat.n_layers)

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Unsafe and retained dialogues."""
        return {"unsafe": config.contrasts, "retain": config.retain}

    def lora(self, depth: int) -> Lora:
        """Every linear layer up to the block above the highest rerouted one."""
        return Lora(tuple(range(self.top(depth) + 1)))

    def lowest(self, depth: int) -> int:
        """First rerouted block."""
        return min(self.blocks(depth))

    def announced(self, config: TrainConfig, depth: int) -> str:
        """Rerouted blocks; warns about the stationary start."""
        if not config.perturbation:
            warnings.warn(
                "At LoRA's start Circuit Breaker has no gradient, so the first step follows rounding noise and differs "
                "between machines. TrainConfig(perturbation=1e-3) makes runs repeat.",
                stacklevel=3,
            )
        return f"{self.name} reroutes blocks {', '.join(map(str, self.blocks(depth)))} of {depth}."

    def about(self, depth: int) -> dict[str, Any]:
        """Hyper-parameters with the rerouted blocks."""
        return asdict(self) | {"layers": self.blocks(depth)}

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """Unsafe dialogues, then retained ones."""
        retain, reroute = breaker_schedule(progress, alpha=self.alpha)
        yield self._reroute(chat, items["unsafe"], reroute)
        yield self._retain(chat, items["retain"], retain)

    def _reroute(self, chat: ChatModel, rows: Sequence[Dialogue], weight: float) -> Part:
        loss = rerouting(beside_reference(chat, dialogue_batch(chat, rows), self._rerouted))
        return Part(weight * loss, {"reroute": loss.detach()})

    def _retain(self, chat: ChatModel, rows: Sequence[Dialogue], weight: float) -> Part:
        pair = beside_reference(chat, dialogue_batch(chat, rows), self._retained)
        moved = len(pair.tuned)
        # the mean counts the embeddings as one more layer, at distance 0
        loss = distance(*pair, relative=self.relative) * (moved / (moved + 1))
        return Part(weight * loss, {"retain": loss.detach()})

    def _rerouted(self, chat: ChatModel, batch: Batch) -> BlockStates:
        blocks = self.blocks(chat.n_layers)
        return block_outputs(chat, batch, blocks, last=max(blocks))

    def _retained(self, chat: ChatModel, batch: Batch) -> BlockStates:
        top = self.top(chat.n_layers)
        states = block_outputs(chat, batch, range(top + 1), last=top)
        return torch.cat([states[:-1], chat.final_norm(states[-1:])])
