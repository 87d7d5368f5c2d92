"""Answers and texts that a model is made to read, token by token: how surprising each is, and how far edits move it.

Final states are kept, logits are made a stretch of tokens at a time. Means are over tokens, their intervals are for
other rows (texts, prompts) than these: a bootstrap over rows, as tokens of one row are not independent. No paper
states that interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from replib.core.errors import ReplibError
from replib.models.chat_model import ChatModel, evaluating
from replib.models.forward import answer_states, answer_tokens, in_stretches
from replib.models.tokens import Batch, Row


def token_kl(base: Float[Tensor, "*tokens vocab"], edited: Float[Tensor, "*tokens vocab"]) -> Float[Tensor, " *tokens"]:
    """KL(base || edited) of each next-token distribution, nats, float64, from exact log-softmax.

    A token that the base suppresses (logit −inf) adds nothing; one that the edit alone suppresses makes it inf. NaN
    only where logits are.
    """
    p, q = base.double().log_softmax(-1), edited.double().log_softmax(-1)
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)


class Tokens(NamedTuple):
    """What is known of each token that was read by force, ``[tokens]``, float64 on the CPU."""

    row: Int[Tensor, " tokens"]
    """Of which text or prompt it is."""
    first: Bool[Tensor, " tokens"]
    """Whether it is the first of its row."""
    base: Float[Tensor, " tokens"]
    """−log p under the unedited model, nats."""
    edited: Float[Tensor, " tokens"]
    """The same under the edits in place."""
    kl: Float[Tensor, " tokens"]
    """KL(unedited || edited) of the distribution that it was drawn from, nats."""


@dataclass(frozen=True)
class Forced:
    """Batches of rows to be read by force, and what the unedited model makes of them."""

    model: ChatModel
    batches: tuple[Batch, ...]
    states: tuple[Tensor, ...]
    """What left the final norm where each counted token is predicted, unedited; ``[tokens, dim]`` a batch."""

    @classmethod
    @torch.no_grad()
    def own(cls, model: ChatModel, prompts: Sequence[str], *, tokens: int = 32, batch_size: int = 64) -> Forced:
        """The model's own greedy answers, ``tokens`` long or to their end, which is counted too."""
        batches = [model.encode(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
        return cls._of(model, (_answered(model, batch, tokens) for batch in batches))

    @classmethod
    def texts(
        cls, model: ChatModel, texts: Sequence[str], *, length: int = 128, context: int = 32, batch_size: int = 16
    ) -> Forced:
        """Plain texts without a template, the first ``length`` tokens of each.

        The first ``context`` of them stand as the prompt and are not counted: an edit of prompt tokens acts there.

        Raises ReplibError where no text is longer than the context.
        """
        read = model.tokenizer(list(texts), truncation=True, max_length=min(length, model.context))["input_ids"]
        rows = [Row(ids, (0, context), context) for ids in read if len(ids) > context]
        if not rows:
            raise ReplibError(f"No text is longer than {context} tokens: join lines, or give longer texts.")
        return cls._of(model, (model.pad(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)))

    @classmethod
    @torch.no_grad()
    def _of(cls, model: ChatModel, batches: Iterator[Batch]) -> Forced:
        kept = tuple(batches)
        with evaluating(model.model):
            return cls(model, kept, tuple(answer_states(model, batch) for batch in kept))

    @torch.no_grad()
    def read(self) -> Tokens:
        """Every counted token under the edits now in place, beside the unedited model."""
        with evaluating(self.model.model):
            parts = [self._tokens(*pair) for pair in zip(self.batches, self.states, strict=True)]
        starts = np.cumsum([0, *(len(batch.input_ids) for batch in self.batches)])
        moved = [part._replace(row=part.row + start) for part, start in zip(parts, starts[:-1].tolist(), strict=True)]
        return Tokens(*(torch.cat(column) for column in zip(*moved, strict=True)))

    def _tokens(self, batch: Batch, before: Tensor) -> Tokens:
        def stretch(b: Tensor, a: Tensor, token: Tensor) -> Tensor:
            base, edited = self.model.logits(b), self.model.logits(a)
            losses = [F.cross_entropy(x.double(), token, reduction="none") for x in (base, edited)]
            return torch.stack([*losses, token_kl(base, edited)]).cpu()

        after, tokens = answer_states(self.model, batch), answer_tokens(batch)
        row = batch.response_mask.nonzero()[:, 0].cpu()
        first = torch.ones_like(row, dtype=torch.bool)
        first[1:] = row[1:] != row[:-1]
        return Tokens(row, first, *torch.cat(in_stretches(self.model, stretch, before, after, tokens), 1))


def _answered(model: ChatModel, batch: Batch, tokens: int) -> Batch:
    new = model.continued(batch, tokens)[:, batch.input_ids.shape[1] :]
    ends = model.ends(new)
    return batch.answered(new, ends.cumsum(1) - ends.long() == 0)
