"""Defences that make safe answers likely or unsafe ones unlikely: SFT, DPO and NPO, as the trainer trains them.

All read the tokens of answers alone, their end-of-sequence token among them. Where a source divides by padding or
counts the prompt's tokens, its docstring says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from replib.core.errors import ReplibError, check_choice, check_coefficients, check_positive
from replib.data.mixtures import check_lists
from replib.defences.losses import asked, cross_entropy, summed_kl
from replib.models.chat_model import ChatModel
from replib.models.forward import answer_states, answer_tokens, answered, token_losses
from replib.training.config import TrainConfig
from replib.training.objective import Objective, Part, reference


@dataclass(frozen=True)
class SFT(Objective):
    """Supervised fine-tuning: L = −mean log p(token), over all answer tokens of the micro-batch, nats.

    On safe answers it is the plainest of defences (arXiv 2504.01550, A.2: one epoch, rate 5e-5, batch 16). On unsafe
    ones it is what task arithmetic subtracts and what WHP calls the reinforced model.
    """

    name = "SFT"
    side: str = "safe"
    """Which answers are learned: "safe" or "unsafe"."""

    def __post_init__(self) -> None:
        check_choice("side", self.side, ("safe", "unsafe"))

    def check(self, chat: ChatModel, data: Any) -> None:
        """There must be answers of that side."""
        del chat
        check_lists(self.name, data, self.side)

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Answers of one side."""
        return {self.side: config.contrasts}

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """One part."""
        del progress
        loss = cross_entropy(chat, items[self.side])
        yield Part(loss, {"ce": loss.detach()})


@dataclass(frozen=True)
class RetainLoss:
    """What holds a model in place while it unlearns: L = ce · CE + kl · τ² KL(base ‖ model), means over answer tokens.

    NPO-RT has the first, NPO-KL the second (there over all tokens, prompts and padding too). RepBend's comparison has
    both, on safe answers: ``RetainLoss(ce=1, kl=0.1, temperature=2, on="safe")``.
    """

    ce: float = 0.0
    """Weight of the cross-entropy of the answers themselves."""
    kl: float = 0.0
    """Weight of the divergence from the base model."""
    temperature: float = 1.0
    """Of the divergence, which is multiplied by its square."""
    on: str = "retain"
    """Which list: "retain" or "safe"."""

    def __post_init__(self) -> None:
        check_coefficients(ce=self.ce, kl=self.kl)
        check_positive(temperature=self.temperature)
        check_choice("on", self.on, ("retain", "safe"))

    @property
    def lists(self) -> tuple[str, ...]:
        """What is drawn: nothing where both weights are 0."""
        return (self.on,) if self.ce or self.kl else ()

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Answers to keep."""
        return {name: config.retain for name in self.lists}

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence]) -> Iterator[Part]:
        """One part, or none."""
        if not self.lists:
            return
        batch = answered(chat, asked(items[self.on]))
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
    """Nothing but what holds a model in place: the other half of a defence that only adds a loss."""

    name = "retention"
    keep: RetainLoss = RetainLoss(kl=1.0)

    def check(self, chat: ChatModel, data: Any) -> None:
        """There must be answers to keep, and a weight on them."""
        del chat
        if not self.keep.lists:
            raise ReplibError("Retention with both weights 0 keeps nothing: give Keep(kl=1).")
        check_lists(self.name, data, *self.keep.lists)

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Answers to keep."""
        return self.keep.draws(config)

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """One part."""
        del progress
        yield from self.keep.parts(chat, items)
