"""Supervised fine-tuning on answers, and the retain loss that unlearning defences add.

Losses run over answer tokens, the end-of-sequence token included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from replib.core.errors import ReplibError, check_choice, check_coefficients, check_positive
from replib.data.mixtures import check_lists
from replib.data.prompts import Dialogue
from replib.defences.losses import dialogue_batch, summed_kl
from replib.models.chat_model import ChatModel
from replib.models.forward import answer_states, answer_tokens, token_losses
from replib.training.config import TrainConfig
from replib.training.objective import Objective, Part, reference


def cross_entropy(chat: ChatModel, rows: Sequence[Dialogue]) -> Tensor:
    """Mean −log p over the answer tokens of all rows, nats."""
    batch = dialogue_batch(chat, rows)
    return token_losses(chat, answer_states(chat, batch), answer_tokens(batch)).mean()


@dataclass(frozen=True)
class SFT(Objective):
    """Supervised fine-tuning: L = −mean log p(token), over all answer tokens of the micro-batch, nats.

    Safe answers give the simplest defence (arXiv 2504.01550, A.2: one epoch, rate 5e-5, batch 16). Unsafe answers give
    the task vector that task arithmetic subtracts and WHP's reinforced model.
    """

    name = "SFT"
    side: str = "safe"
    """Learned answers: "safe" or "unsafe"."""

    def __post_init__(self) -> None:
        check_choice("side", self.side, ("safe", "unsafe"))

    def check(self, chat: ChatModel, data: Any) -> None:
        """Raise ReplibError without answers of that side."""
        del chat
        check_lists(self.name, data, self.side)

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Answers of one side."""
        return {self.side: config.contrasts}

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """Cross-entropy as one part."""
        del progress
        loss = cross_entropy(chat, items[self.side])
        yield Part(loss, {"ce": loss.detach()})


@dataclass(frozen=True)
class RetainLoss:
    """Retain loss beside unlearning: L = ce · CE + kl · τ² KL(base ‖ model), means over answer tokens.

    NPO-RT has the first term, NPO-KL the second (in its source over all tokens, prompts and padding too). RepBend's
    comparison has both, on safe answers: ``RetainLoss(ce=1, kl=0.1, temperature=2, on="safe")``.
    """

    ce: float = 0.0
    """Weight of the cross-entropy of the answers."""
    kl: float = 0.0
    """Weight of the KL divergence from the base model."""
    temperature: float = 1.0
    """Temperature τ of the divergence, which is multiplied by τ²."""
    on: str = "retain"
    """List of answers: "retain" or "safe"."""

    def __post_init__(self) -> None:
        check_coefficients(ce=self.ce, kl=self.kl)
        check_positive(temperature=self.temperature)
        check_choice("on", self.on, ("retain", "safe"))

    @property
    def lists(self) -> tuple[str, ...]:
        """Names of the drawn lists; () if both weights are 0."""
        return (self.on,) if self.ce or self.kl else ()

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Retained answers."""
        return {name: config.retain for name in self.lists}

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence]) -> Iterator[Part]:
        """Retain loss as one part; none if both weights are 0."""
        if not self.lists:
            return
        batch = dialogue_batch(chat, items[self.on])
        states, tokens, terms = answer_states(chat, batch), answer_tokens(batch), {}
        if self.ce:
            terms["retain_ce"] = token_losses(chat, states, tokens).mean()
        if self.kl:
            with reference(chat) as base:
                before = answer_states(base, batch)
            terms["retain_kl"] = summed_kl(chat, before, states, self.temperature) / len(tokens)
        weights = {"retain_ce": self.ce, "retain_kl": self.kl}
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        yield Part(loss, {name: term.detach() for name, term in terms.items()})


@dataclass(frozen=True)
class Retention(Objective):
    """Retain loss alone, as inner objective of hardening."""

    name = "retention"
    keep: RetainLoss = RetainLoss(kl=1.0)

    def check(self, chat: ChatModel, data: Any) -> None:
        """Raise ReplibError without retained answers or without a weight on them."""
        del chat
        if not self.keep.lists:
            raise ReplibError("Retention with both weights 0 has no loss; give RetainLoss(kl=1).")
        check_lists(self.name, data, *self.keep.lists)

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Retained answers."""
        return self.keep.draws(config)

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """Retain loss as one part."""
        del progress
        yield from self.keep.parts(chat, items)
