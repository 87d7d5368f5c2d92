"""Defences that move the representations of harmful dialogues elsewhere: RMU and Circuit Breaker.

Both read every token of a dialogue, prompts too, but no padding, and both stop their passes where nothing more is read.
Layers are blocks counted from 0 and read at their output: block i is ``hidden_states[i + 1]`` of transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from replib.bend import distance
from replib.core.errors import check_blocks, check_coefficients, check_positive
from replib.data.mixtures import check_lists
from replib.data.prompts import Dialogue
from replib.defences import Pair, breaker_schedule, mean_square, rerouting, rmu_target
from replib.likelihood import asked
from replib.models.chat_model import ChatModel
from replib.models.forward import answered, passed
from replib.models.tokens import Batch
from replib.needs import block_at
from replib.training.config import TrainConfig
from replib.training.objective import Lora, Objective, Part, reference

States = Float[Tensor, "layers tokens dim"]


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


def _compared(chat: ChatModel, batch: Batch, read: Callable[[ChatModel, Batch], States]) -> Pair:
    """What is read of the model and of its reference."""
    with reference(chat) as base:
        before = read(base, batch)
    return Pair(read(chat, batch), before)


def _outputs(chat: ChatModel, batch: Batch, blocks: Sequence[int], *, last: int) -> States:
    """Outputs of blocks on every token that is read; the pass ends after ``last``."""
    read, kept = batch.attention_mask.bool(), {}

    def keep(block: int) -> Callable[[Tensor], None]:
        def hook(hidden: Tensor) -> None:
            kept[block] = hidden[read]

        return hook

    passed(chat, batch, {("resid_post", i): keep(i) for i in blocks}, last=last)
    return torch.stack([kept[i] for i in blocks])
