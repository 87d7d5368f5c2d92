"""Defences that move the representations of harmful dialogues elsewhere: RMU and Circuit Breaker.

Both read every token of a dialogue, prompts too, but no padding, and both stop their passes where nothing more is read.
Layers are blocks counted from 0 and read at their output: block i is ``hidden_states[i + 1]`` of transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError, check_blocks, check_coefficients
from replib.data.mixtures import check_lists
from replib.data.prompts import Dialogue
from replib.defences.losses import Pair, States, _compared, _outputs, _wide, asked, block_at, distance
from replib.models.chat_model import ChatModel
from replib.models.forward import answered
from replib.models.tokens import Batch
from replib.training.config import TrainConfig
from replib.training.objective import Lora, Objective, Part


class DefenceTerms(NamedTuple):
    """The loss to minimise and its two unweighted halves: on what must stay, and on what must go."""

    total: Float[Tensor, ""]
    retain: Float[Tensor, ""]
    forget: Float[Tensor, ""]


def circuit_breaker(retain: Pair, harmful: Pair, *, progress: float, alpha: float = 10.0) -> DefenceTerms:
    """Circuit breaking by representation rerouting, Zou et al. 2024 (arXiv 2406.04313), Algorithm 1.

    L = c_r ‖h'_retain − h‖₂ + c_s ReLU(cos(h'_harmful, h)),  c_r = α p/2,  c_s = α (1 − p/2),  p from 0 to 1

    Both terms are means over layers and counted tokens (the official code divides the first by padding too).
    At h' = h both gradients are zero: cos is at its maximum, the distance at its kink. A LoRA adapter, which
    starts there, leaves only by rounding noise, so perturb `lora_B` before training for runs that repeat.
    """
    weight_retain, weight_reroute = breaker_schedule(progress, alpha=alpha)
    apart, reroute = distance(*_wide(retain)), rerouting(harmful)
    return DefenceTerms(weight_retain * apart + weight_reroute * reroute, apart, reroute)


def rerouting(harmful: Pair) -> Float[Tensor, ""]:
    """Mean ReLU(cos(h', h)) over layers and tokens: 0 where no state points its old way any more."""
    return F.cosine_similarity(*_wide(harmful), dim=-1).relu().mean()


def breaker_schedule(progress: float, *, alpha: float = 10.0) -> tuple[float, float]:
    """Weights (c_r, c_s) of retaining and rerouting after a share of training; they sum to alpha and end equal."""
    if not 0 <= progress <= 1:
        raise ReplibError(f"progress={progress} lies outside 0 to 1: give the share of training that is behind.")
    return alpha * progress / 2, alpha * (1 - progress / 2)


@dataclass(frozen=True)
class CircuitBreaker(Objective):
    """Circuit breaking by representation rerouting, Zou et al. 2024 (arXiv 2406.04313), Algorithm 1.

    L = c_r mean ‖h'(retain) − h‖₂ + c_s mean ReLU(cos(h'(unsafe), h)),  c_r = α p/2,  c_s = α (1 − p/2)

    p is the share of training that is behind. Defaults are the official ones for Llama-3-8B (α 10, Mistral 5; 150
    steps, rate 1e-4, batch 16, LoRA of rank 16 with dropout 0.05); RepBend's comparison has α = 15 and 200 steps.

    As in the source, the model ends one block above the highest layer: up to there it is adapted, and retained over
    all its hidden states (the embeddings, which never move, and the last output behind the final norm). Its layers 10
    and 20 are hidden states: the outputs of blocks 9 and 19. The source divides the retain term by padding too; here
    it is the mean over tokens.

    At LoRA's start the cosine is at its maximum and the distance at its kink: neither has a gradient.
    """

    name = "Circuit Breaker"
    alpha: float = 10.0
    """Weight of both terms together."""
    layers: tuple[int, ...] = ()
    """Blocks whose outputs are rerouted; () takes the depths of blocks 9 and 19 of 32."""
    relative: bool = False
    """Retain shares of a state's length instead of lengths. Ours: a cosine knows no scale, a distance does, so that on
    a model with long states the retain term outweighs the other from the first step on, and nothing is rerouted."""

    def __post_init__(self) -> None:
        check_coefficients(alpha=self.alpha)

    def blocks(self, depth: int) -> tuple[int, ...]:
        """The rerouted blocks in a model of so many; ReplibError where one does not exist."""
        found = self.layers or tuple(sorted({block_at(10, depth), block_at(20, depth)}))
        check_blocks(found, depth)
        return found

    def top(self, depth: int) -> int:
        """The last block that is adapted and retained."""
        return min(max(self.blocks(depth)) + 1, depth - 1)

    def check(self, chat: ChatModel, data: Any) -> None:
        """There must be both lists, and the blocks."""
        check_lists(self.name, data, "unsafe", "retain")
        self.blocks(chat.n_layers)

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Unsafe and retained dialogues."""
        return {"unsafe": config.contrasts, "retain": config.retain}

    def lora(self, depth: int) -> Lora:
        """Every linear layer up to the block above the highest rerouted one."""
        return Lora(tuple(range(self.top(depth) + 1)))

    def lowest(self, depth: int) -> int:
        """The first rerouted block."""
        return min(self.blocks(depth))

    def announced(self, config: TrainConfig, depth: int) -> str:
        """The rerouted blocks; warns where the start is stationary."""
        if not config.perturbation:
            warnings.warn(
                "At LoRA's start Circuit Breaker has no gradient, so the first step follows rounding noise and differs "
                "between machines. TrainConfig(perturbation=1e-3) makes runs repeat.",
                stacklevel=3,
            )
        return f"{self.name} reroutes blocks {', '.join(map(str, self.blocks(depth)))} of {depth}."

    def about(self, depth: int) -> dict[str, Any]:
        """Hyper-parameters with the blocks that were rerouted."""
        return asdict(self) | {"layers": self.blocks(depth)}

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """Unsafe dialogues, then retained ones."""
        retain, reroute = breaker_schedule(progress, alpha=self.alpha)
        yield self._reroute(chat, items["unsafe"], reroute)
        yield self._retain(chat, items["retain"], retain)

    def _reroute(self, chat: ChatModel, rows: Sequence[Dialogue], weight: float) -> Part:
        loss = rerouting(_compared(chat, answered(chat, asked(rows)), self._rerouted))
        return Part(weight * loss, {"reroute": loss.detach()})

    def _retain(self, chat: ChatModel, rows: Sequence[Dialogue], weight: float) -> Part:
        pair = _compared(chat, answered(chat, asked(rows)), self._retained)
        moved = len(pair.tuned)
        loss = distance(*pair, relative=self.relative) * (
            moved / (moved + 1)
        )  # the embeddings are one more layer, and they stay
        return Part(weight * loss, {"retain": loss.detach()})

    def _rerouted(self, chat: ChatModel, batch: Batch) -> States:
        blocks = self.blocks(chat.n_layers)
        return _outputs(chat, batch, blocks, last=max(blocks))

    def _retained(self, chat: ChatModel, batch: Batch) -> States:
        top = self.top(chat.n_layers)
        states = _outputs(chat, batch, range(top + 1), last=top)
        return torch.cat([states[:-1], chat.final_norm(states[-1:])])
