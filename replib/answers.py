"""Answers under a model: rows with their end, and the logits of no tokens but theirs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F  # noqa: N812 - the name every PyTorch reader knows
from jaxtyping import Float, Int
from torch import Tensor

from replib.chat import Batch, ChatModel
from replib.passes import passed


def answered(chat: ChatModel, pairs: Iterable[tuple[str, str]]) -> Batch:
    """Prompts and their answers as one batch, each answer with its end-of-sequence token."""
    prompts, answers = zip(*pairs, strict=True)
    end = chat.tokenizer.eos_token or ""
    return chat.encode(prompts, [answer + end for answer in answers])


def answer_tokens(batch: Batch) -> Int[Tensor, " answered"]:
    """Ids of the answers' tokens, row after row."""
    return batch.input_ids[batch.response_mask]


def answer_logits(chat: ChatModel, batch: Batch) -> Float[Tensor, "answered vocab"]:
    """Logits that predict the tokens of ``answer_tokens``, float32; no others are made.

    Each is read one token earlier: the last token of the prompt predicts the first of the answer.
    """
    final = passed(chat, batch)
    assert final is not None  # the pass went to the end
    return chat.logits(final[:, :-1][batch.response_mask[:, 1:]])


def answer_logp(
    logits: Float[Tensor, "answered vocab"], tokens: Int[Tensor, " answered"], batch: Batch
) -> Float[Tensor, " rows"]:
    """Summed log-probability of each row's answer, nats."""
    found = -F.cross_entropy(logits, tokens, reduction="none")
    row = batch.response_mask.nonzero()[:, 0]
    return torch.zeros(len(batch.input_ids), dtype=found.dtype, device=found.device).index_add(0, row, found)
