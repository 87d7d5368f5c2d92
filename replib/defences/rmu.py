"""RMU, Li et al. 2024 (arXiv 2403.03218): representations of unsafe dialogues are steered to a random direction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import check_blocks, check_coefficients, check_positive
from replib.data.mixtures import check_lists
from replib.data.prompts import Dialogue
from replib.defences.losses import (
    BlockStates,
    StatePair,
    beside_reference,
    block_at_depth,
    block_outputs,
    dialogue_batch,
    widened,
)
from replib.models.chat_model import ChatModel
from replib.models.tokens import Batch
from replib.training.config import TrainConfig
from replib.training.objective import Lora, Objective, Part


def mean_square(pair: StatePair) -> Float[Tensor, ""]:
    """Mean squared difference over layers, tokens and dimensions."""
    tuned, goal = widened(pair)
    return (tuned - goal).square().mean()


def rmu_target(dim: int, *, steering: float = 6.5, seed: int = 0) -> Float[Tensor, " dim"]:
    """Steering vector c·u of unsafe tokens: drawn uniformly from [0, 1)^dim, scaled to length ``steering``."""
    noise = torch.rand(dim, generator=torch.Generator().manual_seed(seed))
    return steering * noise / noise.norm()


@dataclass(frozen=True)
class RMU(Objective):
    """Representation misdirection for unlearning, Li et al. 2024 (arXiv 2403.03218), §4.

    L = mean ‖h'(unsafe) − c·u‖²/d + α mean ‖h'(retain) − h‖²/d  at the output of one block, u a fixed random unit
    vector. Means run over all tokens of the dialogues, prompts included, and over the d dimensions, as in the official
    code. Defaults are the official ones for Zephyr-7B (α 1200, c 6.5, block 7 of 32, MLP down-projections of blocks 5
    to 7, 150 steps, rate 5e-5, batch 4); RepBend's comparison has α = 3.

    The source trains these matrices themselves; here LoRA of the trainer's rank adapts them. The source chose its layer
    for hazardous knowledge; for refusal, choose it by validation.
    """

    name = "RMU"
    alpha: float = 1200.0
    """Weight of retaining."""
    steering: float = 6.5
    """c, length of the steering vector. It should exceed the usual norm at that block."""
    layer: int | None = None
    """Block whose output is steered; None takes the depth of block 7 of 32."""
    modules: tuple[str, ...] = ("down_proj",)
    """Suffix of the name of the MLP's last matrix: "mlp.c_proj" in GPT-2, "dense_4h_to_h" in GPT-NeoX and Falcon."""
    seed: int = 0
    """Seed of u."""

    def __post_init__(self) -> None:
        check_coefficients(alpha=self.alpha)
        check_positive(steering=self.steering)

    def block(self, depth: int) -> int:
        """Steered block in a model of ``depth`` blocks; ReplibError if it does not exist."""
        block = block_at_depth(8, depth) if self.layer is None else self.layer
        check_blocks([block], depth)
        return block

    def check(self, chat: ChatModel, data: Any) -> None:
        """Both lists must be filled, and the block must exist."""
        check_lists(self.name, data, "unsafe", "retain")
        self.block(chat.n_layers)

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Unsafe and retained dialogues."""
        return {"unsafe": config.contrasts, "retain": config.retain}

    def lora(self, depth: int) -> Lora:
        """Down-projections of the steered block and of the two before it."""
        last = self.block(depth)
        return Lora(tuple(range(max(0, last - 2), last + 1)), self.modules)

    def lowest(self, depth: int) -> int:
        """Steered block."""
        return self.block(depth)

    def announced(self, config: TrainConfig, depth: int) -> str:
        """Steered block and adapted blocks."""
        del config
        return f"{self.name} steers block {self.block(depth)} of {depth} and adapts blocks {self.lora(depth).blocks}."

    def about(self, depth: int) -> dict[str, Any]:
        """Hyper-parameters with the steered block."""
        return asdict(self) | {"layer": self.block(depth)}

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """Unsafe dialogues, then retained ones."""
        del progress
        yield self._forget(chat, items["unsafe"])
        yield self._retain(chat, items["retain"])

    def _forget(self, chat: ChatModel, rows: Sequence[Dialogue]) -> Part:
        states = self._output(chat, dialogue_batch(chat, rows))
        target = rmu_target(chat.d_model, steering=self.steering, seed=self.seed)
        loss = mean_square(StatePair(states, target.to(states.device)))
        return Part(loss, {"forget": loss.detach()})

    def _retain(self, chat: ChatModel, rows: Sequence[Dialogue]) -> Part:
        loss = mean_square(beside_reference(chat, dialogue_batch(chat, rows), self._output))
        return Part(self.alpha * loss, {"retain": loss.detach()})

    def _output(self, chat: ChatModel, batch: Batch) -> BlockStates:
        block = self.block(chat.n_layers)
        return block_outputs(chat, batch, (block,), last=block)
