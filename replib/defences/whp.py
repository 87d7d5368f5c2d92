"""WHP, Eldan & Russinovich 2023 (arXiv 2310.02238): training on unsafe answers with generic labels.

The caller gives the trainer as ``fit(model, data, objective)``, for example::

    fit = lambda model, data, objective: train(model, data, objective, config=config)

Adapters are attached to the given model and detached again, without a copy of its weights.
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
from replib.defences.losses import dialogue_batch
from replib.defences.sft import SFT, RetainLoss
from replib.models.adapters import detached
from replib.models.chat_model import ChatModel, evaluating
from replib.models.forward import answer_states, chunk_size, token_losses
from replib.training.config import TrainConfig
from replib.training.objective import Objective, Part, reference
from replib.training.result import TrainResult
from replib.training.train import FitDefence


def generic_logits(
    reinforced: Float[Tensor, "tokens vocab"], base: Float[Tensor, "tokens vocab"], *, alpha: float = 5.0
) -> Float[Tensor, "tokens vocab"]:
    """Logits of a model without the forgotten data, Eldan & Russinovich 2023 (arXiv 2310.02238), §2.

    v_generic = v_base − α ReLU(v_reinforced − v_base). Logits that training on the forgotten data
    raised are lowered, the others stay.
    """
    return base - alpha * (reinforced - base).relu()


@dataclass(frozen=True)
class LabelledDialogue(Dialogue):
    """An unsafe answer with a generic label at each of its tokens."""

    labels: tuple[int, ...] = field(default=(), kw_only=True)
    """One token id for each token of the answer, the end-of-sequence token included."""


@dataclass(frozen=True)
class WHP(Objective):
    """Who's Harry Potter, Eldan & Russinovich 2023 (arXiv 2310.02238): generic tokens in place of unsafe ones.

    L = −mean log p(label) over the tokens of unsafe answers + ``keep``. Labels come from ``relabelled`` and stay fixed,
    so training runs neither the reinforced model nor the base.

    RepBend's comparison trains 150 steps at rate 5e-5, without retain loss and with one on safe answers ("WHP retain").
    """

    name = "WHP"
    keep: RetainLoss = RetainLoss()

    def check(self, chat: ChatModel, data: Any) -> None:
        """Raise ReplibError for unsafe answers without labels, or a missing list of ``keep``."""
        del chat
        check_lists(self.name, data, "unsafe", *self.keep.lists)
        if bare := sum(not isinstance(d, LabelledDialogue) for d in data.unsafe):
            raise ReplibError(f"{bare} of {len(data.unsafe)} unsafe answers have no labels: train a model on them with "
                              "SFT(side='unsafe') and give whp.relabelled(model, data.unsafe).")  # fmt: skip

    def draws(self, config: TrainConfig) -> dict[str, int]:
        """Labelled unsafe answers and retained ones."""
        return {"unsafe": config.contrasts} | self.keep.draws(config)

    def parts(self, chat: ChatModel, items: Mapping[str, Sequence], progress: float) -> Iterator[Part]:
        """Forget loss, then retain loss."""
        del progress
        yield self._forget(chat, items["unsafe"])
        yield from self.keep.parts(chat, items)

    def _forget(self, chat: ChatModel, rows: Sequence[LabelledDialogue]) -> Part:
        states = answer_states(chat, dialogue_batch(chat, rows))
        labels = torch.tensor([token for row in rows for token in row.labels], device=states.device)
        if len(labels) != len(states):
            raise ReplibError(f"{len(states)} answer tokens have {len(labels)} labels, made with another tokenizer. "
                              "Make them again with whp.relabelled.")  # fmt: skip
        loss = token_losses(chat, states, labels).mean()
        return Part(loss, {"generic": loss.detach()})


@torch.no_grad()
def relabelled(
    reinforced: ChatModel, unsafe: Sequence[Dialogue], *, alpha: float = 5.0, batch_size: int = 16
) -> list[LabelledDialogue]:
    """Unsafe answers with their generic labels: the argmax of z_base − α ReLU(z_reinforced − z_base), Eq. 1 of WHP.

    Args:
        reinforced: the base model with an adapter that was trained on unsafe answers.
        unsafe: the answers.
        alpha: factor on the raised part of the logits. RepBend's scripts have 0.5 and 5.
        batch_size: answers a forward pass.
    """
    check_coefficients(alpha=alpha)
    labelled: list[LabelledDialogue] = []
    with evaluating(reinforced.model):
        for start in range(0, len(unsafe), batch_size):
            labelled += _labelled(reinforced, unsafe[start : start + batch_size], alpha)
    return labelled


def _labelled(reinforced: ChatModel, rows: Sequence[Dialogue], alpha: float) -> list[LabelledDialogue]:
    batch = dialogue_batch(reinforced, rows)
    with reference(reinforced) as base:
        plain = answer_states(base, batch)
    size = chunk_size(reinforced)  # shared, since no adapter changes the unembedding
    pairs = zip(answer_states(reinforced, batch).split(size), plain.split(size), strict=True)
    labels = [generic_logits(*map(reinforced.logits, pair), alpha=alpha).argmax(dim=-1) for pair in pairs]
    each = torch.cat(labels).cpu().split(batch.response_mask.sum(dim=1).tolist())
    return [
        LabelledDialogue(d.prompt, d.response, d.split, d.label, d.group, d.way, labels=tuple(part.tolist()))
        for d, part in zip(rows, each, strict=True)
    ]


def train_whp(model: ChatModel, data: DefenceData, fit: FitDefence, *, whp: WHP, alpha: float = 5.0) -> TrainResult:
    """Train WHP in full: a reinforced adapter, its labels, then WHP on the model without that adapter."""
    reinforced = fit(model, data, SFT(side="unsafe")).model
    labels = relabelled(reinforced, data.unsafe, alpha=alpha)
    return fit(detached(reinforced), replace(data, unsafe=labels), whp)
