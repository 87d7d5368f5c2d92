"""Defences that move the representations of harmful dialogues elsewhere: RMU and Circuit Breaker.

Both read every token of a dialogue, prompts too, but no padding, and both stop their passes where nothing more is read.
Layers are blocks counted from 0 and read at their output: block i is ``hidden_states[i + 1]`` of transformers.
"""

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
from replib.defences.circuit_breaker import DefenceTerms
from replib.defences.losses import Pair, States, _compared, _outputs, asked, block_at, mean_square
from replib.models.chat_model import ChatModel
from replib.models.forward import answered
from replib.models.tokens import Batch
from replib.training.config import TrainConfig
from replib.training.objective import Lora, Objective, Part


def rmu(retain: Pair, forget: Pair, *, alpha: float = 1200.0) -> DefenceTerms:
    """Representation misdirection for unlearning, Li et al. 2024 (arXiv 2403.03218), §4.

    L = mean ‖h'_forget − c·u‖² + α mean ‖h'_retain − h‖², with `forget.reference` the constant `rmu_target`.
    The squares are averaged, not summed, over dimensions, as in the official code: both terms scale alike.
    """
    lost, kept = mean_square(forget), mean_square(retain)
    return DefenceTerms(lost + alpha * kept, kept, lost)


def rmu_target(dim: int, *, steering: float = 6.5, seed: int = 0) -> Float[Tensor, " dim"]:
    """The point c·u to which RMU drives forgotten tokens: uniform in [0, 1)^dim, made `steering` long."""
    noise = torch.rand(dim, generator=torch.Generator().manual_seed(seed))
    return steering * noise / noise.norm()


@dataclass(frozen=True)
class RMU(Objective):
    """Representation misdirection for unlearning, Li et al. 2024 (arXiv 2403.03218), §4.

    L = mean ‖h'(unsafe) − c·u‖²/d + α mean ‖h'(retain) − h‖²/d  at the output of one block, u a fixed random unit
    vector; means over tokens. Defaults are the official ones for Zephyr-7B (α 1200, c 6.5, block 7 of 32, MLP
    down-projections of blocks 5 to 7, 150 steps, rate 5e-5, batch 4); RepBend's comparison has α = 3.

    The source trains these matrices themselves. Here LoRA of the trainer's rank adapts them: a low-rank change of the
    same matrices. Its layer was chosen for hazardous knowledge; whether it suits refusal is for validation to say.
    """

    name = "RMU"
    alpha: float = 1200.0
    """Weight of retaining."""
    steering: float = 6.5
    """c: length of the vector that unsafe tokens are driven to. It should exceed the usual norm at that block."""
    layer: int | None = None
    """Block whose output is steered; None takes the depth of block 7 of 32."""
    modules: tuple[str, ...] = ("down_proj",)
    """The MLP's last matrix, as its name ends: "mlp.c_proj" in GPT-2, "dense_4h_to_h" in GPT-NeoX and Falcon."""
    seed: int = 0
    """Draws u."""

    def __post_init__(self) -> None:
        check_coefficients(alpha=self.alpha)
        check_positive(steering=self.steering)

    def block(self, depth: int) -> int:
        """The steered block in a model of so many; ReplibError where there is none."""
        found = block_at(8, depth) if self.layer is None else self.layer
        check_blocks([found], depth)
        return found

    def check(self, chat: ChatModel, data: Any) -> None:
        """There must be both lists, and the block."""
        check_lists(self.name, data, "unsafe", "retain")
        self.block(chat.n_layers)

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Unsafe and retained dialogues."""
        return {"unsafe": config.contrasts, "retain": config.retain}

    def lora(self, depth: int) -> Lora:
        """Down-projections of the block and of the two before it."""
        last = self.block(depth)
        return Lora(tuple(range(max(0, last - 2), last + 1)), self.modules)

    def lowest(self, depth: int) -> int:
        """The steered block."""
        return self.block(depth)

    def announced(self, config: TrainConfig, depth: int) -> str:
        """The steered block and the adapted ones."""
        del config
        return f"{self.name} steers block {self.block(depth)} of {depth} and adapts blocks {self.lora(depth).blocks}."

    def about(self, depth: int) -> dict[str, Any]:
        """Hyper-parameters with the block that was steered."""
        return asdict(self) | {"layer": self.block(depth)}

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """Unsafe dialogues, then retained ones."""
        del progress
        yield self._forget(chat, items["unsafe"])
        yield self._retain(chat, items["retain"])

    def _forget(self, chat: ChatModel, rows: Sequence[Dialogue]) -> Part:
        states = self._read(chat, answered(chat, asked(rows)))
        target = rmu_target(chat.d_model, steering=self.steering, seed=self.seed)
        loss = mean_square(Pair(states, target.to(states.device)))
        return Part(loss, {"forget": loss.detach()})

    def _retain(self, chat: ChatModel, rows: Sequence[Dialogue]) -> Part:
        loss = mean_square(_compared(chat, answered(chat, asked(rows)), self._read))
        return Part(self.alpha * loss, {"retain": loss.detach()})

    def _read(self, chat: ChatModel, batch: Batch) -> States:
        block = self.block(chat.n_layers)
        return _outputs(chat, batch, (block,), last=block)
