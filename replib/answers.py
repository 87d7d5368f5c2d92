"""Answers under a model: rows with their end, read at the tokens that predict them and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from replib.chat import ChatModel
from replib.passes import in_stretches, passed
from replib.tokens import Batch


def answered(chat: ChatModel, pairs: Iterable[tuple[str, str]]) -> Batch:
    """Prompts and their answers as one batch, each answer with its end-of-sequence token."""
    prompts, answers = zip(*pairs, strict=True)
    end = chat.tokenizer.eos_token or ""
    return chat.encode(prompts, [answer + end for answer in answers])


def answer_tokens(batch: Batch) -> Int[Tensor, " answered"]:
    """Ids of the answers' tokens, row after row."""
    return batch.input_ids[batch.response_mask]


def answer_states(chat: ChatModel, batch: Batch) -> Float[Tensor, "answered dim"]:
    """What left the final norm where the tokens of ``answer_tokens`` are predicted, for ``chat.logits``.

    Each is read one token earlier: the last token of the prompt predicts the first of the answer.
    """
    final = passed(chat, batch)
    assert final is not None  # the pass went to the end
    return final[:, :-1][batch.response_mask[:, 1:]]


def token_losses(
    chat: ChatModel, states: Float[Tensor, "answered dim"], tokens: Int[Tensor, " answered"]
) -> Float[Tensor, " answered"]:
    """−log p of each token, nats. Logits are made a stretch at a time; if there are several, anew for the gradient."""

    def stretch(s: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(chat.logits(s), t, reduction="none")

    return torch.cat(in_stretches(chat, stretch, states, tokens))


def answer_logp(chat: ChatModel, batch: Batch) -> Float[Tensor, " rows"]:
    """Summed log-probability of each row's answer, nats."""
    losses = token_losses(chat, answer_states(chat, batch), answer_tokens(batch))
    row = batch.response_mask.nonzero()[:, 0]
    return losses.new_zeros(len(batch.input_ids)).index_add(0, row, -losses)
