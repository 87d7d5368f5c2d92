"""What a defence must be given: lists that are filled, coefficients that are numbers, blocks that exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError
from replib.core.stats import kl
from replib.data.prompts import Dialogue
from replib.models.chat_model import ChatModel
from replib.models.forward import (
    answer_logp,
    answer_states,
    answer_tokens,
    answered,
    forward_states,
    in_chunks,
    token_losses,
)
from replib.models.tokens import Batch
from replib.training.objective import reference


def distance(
    bent: Float[Tensor, "layers tokens dim"],
    base: Float[Tensor, "layers tokens dim"],
    *,
    max_distance: float | None = None,
    directional: bool = False,
    relative: bool = False,
) -> Float[Tensor, ""]:
    """Mean L2 distance per token and layer, in float32; with a hinge, counted up to a multiple of the base norm.

    ``directional``: the bent states are first brought to the norm of the base's. ``relative``: as a share of it.
    """
    bent, base = bent.float(), base.float()
    norms = torch.linalg.vector_norm(base, dim=-1)
    if directional:
        bent = torch.nn.functional.normalize(bent, dim=-1) * norms[..., None]
    lengths = torch.linalg.vector_norm(bent - base, dim=-1)
    if max_distance is not None:
        lengths = torch.minimum(lengths, max_distance * norms)
    return (lengths / norms.clamp(min=1e-12) if relative else lengths).mean()


def kl_divergence(
    base_logits: Float[Tensor, "tokens vocab"],
    bent_logits: Float[Tensor, "tokens vocab"],
    temperature: float = 2.0,
    sequences: int | None = None,
) -> Float[Tensor, ""]:
    """tau^2 KL(base || bent) at temperature tau, in nats.

    Mean over tokens; with ``sequences``, the sum over tokens divided by that number.
    """
    p = (base_logits.float() / temperature).log_softmax(-1)
    q = (bent_logits.float() / temperature).log_softmax(-1)
    mean = temperature**2 * kl(p, q).mean()
    return mean if sequences is None else mean * (len(p) / sequences)


def block_at(blocks_of_32: int, depth: int) -> int:
    """The block whose output lies as deep in a model as that of so many blocks does in one of 32."""
    return max(0, round(blocks_of_32 / 32 * depth) - 1)


class Pair(NamedTuple):
    """Hidden states of the same tokens under the tuned model, and what they are held against."""

    tuned: Float[Tensor, "layers tokens dim"]
    reference: Float[Tensor, "... dim"]


class LogProbs(NamedTuple):
    """Summed log-probability of each response under the tuned and the frozen model, nats."""

    tuned: Float[Tensor, " rows"]
    frozen: Float[Tensor, " rows"]


def mean_square(pair: Pair) -> Float[Tensor, ""]:
    """Mean squared difference over layers, tokens and dimensions."""
    tuned, goal = _wide(pair)
    return (tuned - goal).square().mean()


def _wide(pair: Pair) -> Pair:
    """At least float32: in half precision the norms of residuals overflow and their differences vanish."""
    if not pair.tuned.shape[1]:
        raise ReplibError("no token counts in this batch: the hidden states are empty; check how it was encoded.")
    dtype = torch.promote_types(pair.tuned.dtype, torch.float32)
    return Pair(pair.tuned.to(dtype), pair.reference.to(dtype))


def summed_kl(chat: ChatModel, base: Tensor, bent: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(base || bent) at temperature tau, summed over tokens, from what left the final norm, [tokens, dim] each.

    Logits are made for a stretch of tokens at a time; where there are several, anew for the gradient.
    """
    frozen = chat.frozen or chat

    def stretch(b: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            given = frozen.logits(b)
        return kl_divergence(given, chat.logits(t), temperature, sequences=1)

    return torch.stack(in_chunks(chat, stretch, base, bent)).sum()


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


States = Float[Tensor, "layers tokens dim"]


def _compared(chat: ChatModel, batch: Batch, read: Callable[[ChatModel, Batch], States]) -> Pair:
    """What is read of the model and of its reference."""
    with reference(chat) as base:
        before = read(base, batch)
    return Pair(read(chat, batch), before)


def _outputs(chat: ChatModel, batch: Batch, blocks: Sequence[int], *, last: int) -> States:
    """Outputs of blocks on every token that is read; the pass ends after ``last``."""
    read, kept = batch.attention_mask.bool(), {}

    def keep(block: int) -> Callable[[Tensor], None]:
        def hook(hidden: Tensor) -> None:
            kept[block] = hidden[read]

        return hook

    forward_states(chat, batch, {("resid_post", i): keep(i) for i in blocks}, last=last)
    return torch.stack([kept[i] for i in blocks])
