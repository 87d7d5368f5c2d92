"""DPO and NPO: losses on the log-probabilities of whole answers, relative to the model before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import check_positive
from replib.data.mixtures import check_lists
from replib.data.prompts import Contrast
from replib.defences.losses import dialogue_batch
from replib.defences.sft import RetainLoss
from replib.models.chat_model import ChatModel
from replib.models.forward import answer_batch, answer_logp
from replib.models.tokens import Batch
from replib.training.config import TrainConfig
from replib.training.objective import Objective, Part, reference


class LogProbs(NamedTuple):
    """Summed log-probability of each response under the tuned and the frozen model, nats."""

    tuned: Float[Tensor, " rows"]
    frozen: Float[Tensor, " rows"]


def _log_probs(chat: ChatModel, batch: Batch) -> LogProbs:
    with reference(chat) as base:
        frozen = answer_logp(base, batch)
    return LogProbs(answer_logp(chat, batch), frozen)


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
    """Strength of the pull to the reference; larger values keep the model closer."""

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)

    def check(self, chat: ChatModel, data: Any) -> None:
        """Raise ReplibError without pairs."""
        del chat
        check_lists(self.name, data, "pairs")

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Pairs, two rows each."""
        return {"pairs": config.contrasts}

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """Loss in one part, since both answers of a pair enter one logarithm."""
        del progress
        pairs: Sequence[Contrast] = items["pairs"]
        both = [(c.prompt, c.safe_response) for c in pairs] + [(c.prompt, c.unsafe_response) for c in pairs]
        logps = _log_probs(chat, answer_batch(chat, both))
        chosen, rejected = (LogProbs(*x) for x in zip(*(v.split(len(pairs)) for v in logps), strict=True))
        loss = dpo(chosen, rejected, beta=self.beta)
        margin = (chosen.tuned - chosen.frozen - rejected.tuned + rejected.frozen).mean()
        yield Part(loss, {"dpo": loss.detach(), "margin": margin.detach()})


@dataclass(frozen=True)
class NPO(Objective):
    """Negative preference optimisation, Zhang et al. 2024 (arXiv 2404.05868), Eq. 3, on unsafe answers.

    L = −(2/β) mean log σ(−β log(π/π_ref)(unsafe)) + ``keep``; log-probabilities are summed over the answer. The default
    is plain NPO with the paper's β. ``RetainLoss(ce=1)`` is NPO-RT, ``RetainLoss(kl=1)`` NPO-KL, as weighted in the
    official code.
    """

    name = "NPO"
    beta: float = 0.1
    """Inverse temperature; towards 0 the loss becomes gradient ascent."""
    keep: RetainLoss = RetainLoss()

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)

    def check(self, chat: ChatModel, data: Any) -> None:
        """Raise ReplibError without unsafe answers or the list of ``keep``."""
        del chat
        check_lists(self.name, data, "unsafe", *self.keep.lists)

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Unsafe answers and retained ones."""
        return {"unsafe": config.contrasts} | self.keep.draws(config)

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """Forget loss, then retain loss."""
        del progress
        loss = npo(_log_probs(chat, dialogue_batch(chat, items["unsafe"])), beta=self.beta)
        yield Part(loss, {"npo": loss.detach()})
        yield from self.keep.parts(chat, items)
