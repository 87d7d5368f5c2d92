"""Defences that make safe answers likely or unsafe ones unlikely: SFT, DPO and NPO, as the trainer trains them.

All read the tokens of answers alone, their end-of-sequence token among them. Where a source divides by padding or
counts the prompt's tokens, its docstring says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import check_positive
from replib.data.mixtures import check_lists
from replib.data.prompts import Contrast
from replib.defences.losses import LogProbs, asked, log_probs
from replib.defences.sft import RetainLoss
from replib.models.chat_model import ChatModel
from replib.models.forward import answered
from replib.training.config import TrainConfig
from replib.training.objective import Objective, Part


def npo(forget: LogProbs, *, beta: float = 0.1) -> Float[Tensor, ""]:
    """Negative preference optimisation, Zhang et al. 2024 (arXiv 2404.05868), Eq. 3.

    L = −(2/β) E log σ(−β log(π/π_ref)): gradient ascent on the forgotten responses that fades as they become
    unlikely; for β → 0 it is plain gradient ascent.
    """
    return -(2 / beta) * F.logsigmoid(-beta * (forget.tuned - forget.frozen)).mean()


def dpo(chosen: LogProbs, rejected: LogProbs, *, beta: float = 0.1) -> Float[Tensor, ""]:
    """Direct preference optimisation, Rafailov et al. 2023 (arXiv 2305.18290), Eq. 7; refusals are chosen.

    L = −E log σ(β log(π/π_ref)(chosen) − β log(π/π_ref)(rejected)).
    """
    margin = (chosen.tuned - chosen.frozen) - (rejected.tuned - rejected.frozen)
    return -F.logsigmoid(beta * margin).mean()


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
class NPO(Objective):
    """Negative preference optimisation, Zhang et al. 2024 (arXiv 2404.05868), Eq. 3, on unsafe answers.

    L = −(2/β) mean log σ(−β log(π/π_ref)(unsafe)) + what ``keep`` says; log-probabilities are summed over the answer.
    The default is the paper's plain NPO with its β; ``RetainLoss(ce=1)`` is NPO-RT, ``RetainLoss(kl=1)`` NPO-KL, with the weights
    of its official code, where all are 1.
    """

    name = "NPO"
    beta: float = 0.1
    """Inverse temperature; towards 0 the loss becomes gradient ascent."""
    keep: RetainLoss = RetainLoss()

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
