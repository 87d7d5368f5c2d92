"""Defences that make safe answers likely or unsafe ones unlikely: SFT, DPO and NPO, as the trainer trains them.

All read the tokens of answers alone, their end-of-sequence token among them. Where a source divides by padding or
counts the prompt's tokens, its docstring says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from replib.core.errors import ReplibError, check_choice, check_coefficients, check_positive
from replib.data.mixtures import check_lists
from replib.data.prompts import Contrast, Dialogue
from replib.defences import LogProbs, dpo, npo
from replib.models.chat_model import ChatModel
from replib.models.forward import answer_logp, answer_states, answer_tokens, answered, token_losses
from replib.models.tokens import Batch
from replib.repbend import summed_kl
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
class DPO(Objective):
    """Direct preference optimisation, Rafailov et al. 2023 (arXiv 2305.18290), Eq. 7; refusals are chosen.

    L = −mean log σ(β log(π/π_ref)(safe) − β log(π/π_ref)(unsafe)), means over pairs, log-probabilities summed over the
    answer. β = 0.1 as in the paper and in RepBend's comparison (rate 1e-4, one epoch).
    """

    name = "DPO"
    beta: float = 0.1
    """How strongly the model is held to its reference; the larger, the closer it stays."""

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)

    def check(self, chat: ChatModel, data: Any) -> None:
        """There must be pairs."""
        del chat
        check_lists(self.name, data, "pairs")

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Pairs: two rows each."""
        return {"pairs": config.contrasts}

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """One part: both answers of a pair meet within the logarithm."""
        del progress
        pairs: Sequence[Contrast] = items["pairs"]
        both = [(c.prompt, c.safe_response) for c in pairs] + [(c.prompt, c.unsafe_response) for c in pairs]
        found = log_probs(chat, answered(chat, both))
        chosen, rejected = (LogProbs(*x) for x in zip(*(v.split(len(pairs)) for v in found), strict=True))
        loss = dpo(chosen, rejected, beta=self.beta)
        margin = (chosen.tuned - chosen.frozen - rejected.tuned + rejected.frozen).mean()
        yield Part(loss, {"dpo": loss.detach(), "margin": margin.detach()})


@dataclass(frozen=True)
class Keep:
    """What holds a model in place while it unlearns: L = ce · CE + kl · τ² KL(base ‖ model), means over answer tokens.

    NPO-RT has the first, NPO-KL the second (there over all tokens, prompts and padding too). RepBend's comparison has
    both, on safe answers: ``Keep(ce=1, kl=0.1, temperature=2, on="safe")``.
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
    keep: Keep = Keep(kl=1.0)

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


@dataclass(frozen=True)
class NPO(Objective):
    """Negative preference optimisation, Zhang et al. 2024 (arXiv 2404.05868), Eq. 3, on unsafe answers.

    L = −(2/β) mean log σ(−β log(π/π_ref)(unsafe)) + what ``keep`` says; log-probabilities are summed over the answer.
    The default is the paper's plain NPO with its β; ``Keep(ce=1)`` is NPO-RT, ``Keep(kl=1)`` NPO-KL, with the weights
    of its official code, where all are 1.
    """

    name = "NPO"
    beta: float = 0.1
    """Inverse temperature; towards 0 the loss becomes gradient ascent."""
    keep: Keep = Keep()

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)

    def check(self, chat: ChatModel, data: Any) -> None:
        """There must be unsafe answers, and those to keep."""
        del chat
        check_lists(self.name, data, "unsafe", *self.keep.lists)

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Unsafe answers and those to keep."""
        return {"unsafe": config.contrasts} | self.keep.draws(config)

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """What is unlearned, then what is kept."""
        del progress
        loss = npo(log_probs(chat, answered(chat, asked(items["unsafe"]))), beta=self.beta)
        yield Part(loss, {"npo": loss.detach()})
        yield from self.keep.parts(chat, items)


def asked(rows: Sequence[Dialogue]) -> list[tuple[str, str]]:
    """Prompt and answer of each."""
    return [(d.prompt, d.response) for d in rows]


def cross_entropy(chat: ChatModel, rows: Sequence[Dialogue]) -> Tensor:
    """Mean over the answer tokens of all rows, nats."""
    batch = answered(chat, asked(rows))
    return token_losses(chat, answer_states(chat, batch), answer_tokens(batch)).mean()


def log_probs(chat: ChatModel, batch: Batch) -> LogProbs:
    """Of each row's answer, under the model and under its reference."""
    with reference(chat) as base:
        frozen = answer_logp(base, batch)
    return LogProbs(answer_logp(chat, batch), frozen)
