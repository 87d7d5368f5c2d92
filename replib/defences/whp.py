"""Defences that first learn what they shall forget, from a model trained on unsafe answers: WHP and task arithmetic.

Who trains it is given as ``fit(model, data, objective)``, for example with the trainer's defaults::

    fit = lambda model, data, objective: train(model, data, objective, config=config)

Adapters are put onto the given model and taken off again: at no time is there a second copy of its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError, check_coefficients
from replib.data.mixtures import DefenceData, check_lists
from replib.data.prompts import Dialogue
from replib.defences.losses import asked
from replib.defences.sft import SFT, RetainLoss
from replib.models.adapters import detached
from replib.models.chat_model import ChatModel, evaluating
from replib.models.forward import answer_states, answered, stretch_of, token_losses
from replib.training.config import TrainConfig
from replib.training.objective import Objective, Part, reference
from replib.training.result import TrainResult
from replib.training.train import Fit


def generic_logits(
    reinforced: Float[Tensor, "tokens vocab"], base: Float[Tensor, "tokens vocab"], *, alpha: float = 5.0
) -> Float[Tensor, "tokens vocab"]:
    """What a model would say that never read it, Eldan & Russinovich 2023 (arXiv 2310.02238), §2.

    v_generic = v_base − α ReLU(v_reinforced − v_base): tokens that became likelier by training on what shall be
    forgotten are pushed down, the others stay.
    """
    return base - alpha * (reinforced - base).relu()


@dataclass(frozen=True)
class LabelledDialogue(Dialogue):
    """An unsafe answer, and what a model that never learned such answers would say at each of its tokens."""

    labels: tuple[int, ...] = field(default=(), kw_only=True)
    """One token id for each token of the answer, its end-of-sequence token among them."""


@dataclass(frozen=True)
class WHP(Objective):
    """Who's Harry Potter, Eldan & Russinovich 2023 (arXiv 2310.02238): generic words in the place of unsafe ones.

    L = −mean log p(label) over the tokens of unsafe answers + what ``keep`` says. Labels come from ``relabelled`` and
    do not change in training, so neither the reinforced model nor the base is run any more.

    RepBend's comparison trains 150 steps at rate 5e-5, once so and once with safe answers kept ("WHP retain").
    """

    name = "WHP"
    keep: RetainLoss = RetainLoss()

    def check(self, chat: ChatModel, data: Any) -> None:
        """Unsafe answers must be labelled; there must be those to keep."""
        del chat
        check_lists(self.name, data, "unsafe", *self.keep.lists)
        if bare := sum(not isinstance(d, LabelledDialogue) for d in data.unsafe):
            raise ReplibError(f"{bare} of {len(data.unsafe)} unsafe answers have no labels: train a model on them with "
                              "SFT(side='unsafe') and give reinforced.relabelled(model, data.unsafe).")  # fmt: skip

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Labelled unsafe answers and those to keep."""
        return {"unsafe": config.contrasts} | self.keep.draws(config)

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """What is unlearned, then what is kept."""
        del progress
        yield self._forget(chat, items["unsafe"])
        yield from self.keep.parts(chat, items)

    def _forget(self, chat: ChatModel, rows: Sequence[LabelledDialogue]) -> Part:
        states = answer_states(chat, answered(chat, asked(rows)))
        labels = torch.tensor([token for row in rows for token in row.labels], device=states.device)
        if len(labels) != len(states):
            raise ReplibError(f"{len(states)} answer tokens have {len(labels)} labels: they were made with another "
                              "tokenizer. Make them again with reinforced.relabelled.")  # fmt: skip
        loss = token_losses(chat, states, labels).mean()
        return Part(loss, {"generic": loss.detach()})


@torch.no_grad()
def relabelled(
    reinforced: ChatModel, unsafe: Sequence[Dialogue], *, alpha: float = 5.0, batch_size: int = 16
) -> list[LabelledDialogue]:
    """Unsafe answers with their generic labels: the argmax of z_base − α ReLU(z_reinforced − z_base), Eq. 1 of WHP.

    Args:
        reinforced: a model with an adapter that was trained on unsafe answers; without it, it is the base.
        unsafe: the answers.
        alpha: how far tokens that became likelier are pushed down. RepBend's scripts have 0.5 and 5.
        batch_size: answers that are read at once.
    """
    check_coefficients(alpha=alpha)
    found: list[LabelledDialogue] = []
    with evaluating(reinforced.model):
        for start in range(0, len(unsafe), batch_size):
            found += _labelled(reinforced, unsafe[start : start + batch_size], alpha)
    return found


def _labelled(reinforced: ChatModel, rows: Sequence[Dialogue], alpha: float) -> list[LabelledDialogue]:
    batch = answered(reinforced, asked(rows))
    with reference(reinforced) as base:
        plain = answer_states(base, batch)
    size = stretch_of(reinforced)  # the unembedding is not adapted: one serves both
    pairs = zip(answer_states(reinforced, batch).split(size), plain.split(size), strict=True)
    labels = [generic_logits(*map(reinforced.logits, pair), alpha=alpha).argmax(dim=-1) for pair in pairs]
    each = torch.cat(labels).cpu().split(batch.response_mask.sum(dim=1).tolist())
    return [
        LabelledDialogue(d.prompt, d.response, d.split, d.label, d.group, d.way, labels=tuple(part.tolist()))
        for d, part in zip(rows, each, strict=True)
    ]


def train_whp(model: ChatModel, data: DefenceData, fit: Fit, *, whp: WHP, alpha: float = 5.0) -> TrainResult:
    """WHP from the beginning: a reinforced adapter, its labels, and WHP itself on the model without that adapter."""
    reinforced = fit(model, data, SFT(side="unsafe")).model
    labels = relabelled(reinforced, data.unsafe, alpha=alpha)
    return fit(detached(reinforced), replace(data, unsafe=labels), whp)
