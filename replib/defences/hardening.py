"""Hardening: training of refusals under random edits and after the beginnings of unsafe answers.

L = L_inner + weight · mean −log p(token of a refusal | edits, forced beginning), nats, means over tokens

After ReFAT (arXiv 2409.20089), which trains refusals under ablated refusal features, and after "safety alignment should
be made more than just a few tokens deep" (arXiv 2406.05946), which trains them after the first tokens of unsafe
answers. The passes of the inner objective are not edited.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from replib.core.errors import ReplibError, check_coefficients
from replib.core.storage import content_hash
from replib.data.prompts import Contrast, Dialogue
from replib.defences.adversary import Adversary, EditDistribution, SampledEdit
from replib.edits.apply import applied_each
from replib.models.chat_model import ChatModel
from replib.models.forward import forward_states, token_losses, without_checkpointing
from replib.models.tokens import Batch, fitted
from replib.training.config import TrainConfig
from replib.training.objective import Lora, Objective, Part


@dataclass(frozen=True)
class Hardening:
    """Hyper-parameters of hardening."""

    weight: float = 1.0
    """Weight of the refusals' cross-entropy beside the inner loss."""
    edits: int = 4
    """Random edits a micro-batch."""
    plain: int = 1
    """Groups of rows without an edit."""
    rows: int = 4
    """Harmful prompts a group."""
    refit: int = 4
    """Micro-batches between two captures of the activations that fit edits."""
    forced: float = 0.5
    """Share of the rows whose refusal follows the beginning of the unsafe answer."""
    prefix: int = 10
    """Most tokens of such a beginning; the number is uniform."""
    arsenal: EditDistribution = EditDistribution()

    def __post_init__(self) -> None:
        check_coefficients(weight=self.weight)
        if min(self.rows, self.refit, self.prefix, self.edits + self.plain) < 1 or min(self.edits, self.plain) < 0:
            raise ReplibError(f"edits={self.edits}, plain={self.plain}, rows={self.rows}, refit={self.refit}, "
                              f"prefix={self.prefix}: no row is hardened; give 1 or more of each.")  # fmt: skip
        if not 0 <= self.forced <= 1:
            raise ReplibError(f"forced={self.forced} is a share of rows: give a number within 0 and 1.")


@dataclass
class Hardened(Objective):
    """Loss of an inner objective plus the hardened refusals."""

    inner: Objective
    harmful: Sequence[Contrast]
    """Prompts with both answers, the source class of the edits; training refuses them."""
    harmless: Sequence[Dialogue]
    """Answered requests, the target class of the edits."""
    hardening: Hardening = field(default_factory=Hardening)
    seed: int = 0
    """Seed of rows and edits."""
    met: int = field(default=0, repr=False)
    """Micro-batches since the run began."""

    def __post_init__(self) -> None:
        self.adversary = Adversary(self.hardening.arsenal, self.harmful, self.harmless, self.seed)

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name in results."""
        return f"{self.inner.name} + hardening"

    def check(self, chat: ChatModel, data: Any) -> None:
        """Raise ReplibError for lists that the inner objective lacks, missing answers, or too few prompts for edits."""
        self.inner.check(chat, data)
        self.hardening.arsenal.check(chat.n_layers, self.harmful, self.harmless)
        if bad := sum(not c.safe_response.strip() or not c.unsafe_response.strip() for c in self.harmful):
            raise ReplibError(f"{bad} of {len(self.harmful)} harmful prompts lack an answer: fill or drop them.")

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Lists of the inner objective; refusals are drawn from ``harmful`` with ``seed``."""
        return self.inner.draws(config)

    def lora(self, depth: int) -> Lora:
        """Adapted weights of the inner objective."""
        return self.inner.lora(depth)

    def lowest(self, depth: int) -> int:
        """Lowest block of the inner objective."""
        return self.inner.lowest(depth)

    def announced(self, config: TrainConfig, depth: int) -> str:
        """Summary of the inner objective and of the hardened refusals."""
        h = self.hardening
        return (f"{self.inner.announced(config, depth)} Hardening: {h.rows * (h.edits + h.plain)} refusals a "
                f"micro-batch under {h.edits} random edits, fitted anew every {h.refit} on {h.arsenal.prompts} prompts "
                "a class.")  # fmt: skip

    def about(self, depth: int) -> dict[str, Any]:
        """Hyper-parameters of both, and hashes of the prompts."""
        own = {"harmful": content_hash(list(self.harmful)), "harmless": content_hash(list(self.harmless))}
        inner = {"method": self.inner.name} | self.inner.about(depth)
        return {"inner": inner, "hardening": asdict(self.hardening), "seed": self.seed} | own

    def state(self) -> dict[str, Tensor]:
        """State of the inner objective and of the adversary."""
        inner = {f"inner.{name}": x for name, x in self.inner.state().items()}
        return inner | self.adversary.state() | {"met": torch.tensor(self.met)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of ``state``."""
        inner = {name.removeprefix("inner."): x for name, x in state.items() if name.startswith("inner.")}
        self.inner.restore(inner)
        self.adversary.restore(state)
        self.met = int(state.get("met", 0))

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """Parts of the inner objective, then the hardened refusals."""
        yield from self.inner.parts(chat, items, progress)
        loss = self._refused(chat, self._drawn(chat))
        yield Part(self.hardening.weight * loss, {"hardening": loss.detach()})

    def _drawn(self, chat: ChatModel) -> list[SampledEdit]:
        """Draw the edits of a micro-batch; activations are captured again every ``refit`` micro-batches."""
        if self.hardening.edits and self.met % self.hardening.refit == 0:
            self.adversary.fit(chat)
        self.met += 1
        plain = [SampledEdit({}, "all")] * self.hardening.plain
        return [self.adversary.draw(chat) for _ in range(self.hardening.edits)] + plain

    def _refused(self, chat: ChatModel, drawn: Sequence[SampledEdit]) -> Tensor:
        rows = [c for _ in drawn for c in self.adversary.sample(self.harmful, self.hardening.rows)]
        heads = [self._head() for _ in rows]
        with applied_each(chat, [d.edited for d in drawn]), without_checkpointing(chat):
            return refusal_loss(chat, rows, heads)

    def _head(self) -> int:
        """Tokens of the unsafe answer before a refusal, often 0."""
        forced = self.adversary.uniform() < self.hardening.forced
        return 1 + self.adversary.pick(range(self.hardening.prefix)) if forced else 0


def refusal_loss(chat: ChatModel, rows: Sequence[Contrast], heads: Sequence[int]) -> Tensor:
    """Mean −log p over the tokens of the safe answers, each after ``heads`` tokens of the unsafe one, nats."""
    batch, refusal = refusals(chat, rows, heads)
    final = forward_states(chat, batch)
    assert final is not None  # a pass without ``last`` returns states
    return token_losses(chat, final[:, :-1][refusal[:, 1:]], batch.input_ids[refusal]).mean()


def refusals(chat: ChatModel, rows: Sequence[Contrast], heads: Sequence[int]) -> tuple[Batch, Tensor]:
    """Batch of prompts, ``heads`` tokens of unsafe answers and safe answers; mask ``[rows, tokens]`` of the latter.

    An unsafe answer shorter than its head enters whole; the safe one includes the end-of-sequence token.
    """
    end, ids = chat.tokenizer.eos_token or "", lambda text: chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    begun = [ids(c.unsafe_response)[:n] for c, n in zip(rows, heads, strict=True)]
    safe = [ids(" " * bool(head) + c.safe_response + end) for c, head in zip(rows, begun, strict=True)]
    asked = chat.tokenize([c.prompt for c in rows])
    whole = [row.answered(head + tail) for row, head, tail in zip(asked, begun, safe, strict=True)]
    batch = chat.pad(fitted(whole, chat.context, "truncate", chat.name))
    column = torch.arange(batch.input_ids.shape[1], device=chat.device)
    lengths = torch.tensor([[len(tail)] for tail in safe], device=chat.device)
    return batch, column >= len(column) - lengths
