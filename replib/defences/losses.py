"""Losses that several defences share, and the hidden states that they compare."""

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
from replib.models.forward import answer_batch, forward_states, in_chunks
from replib.models.tokens import Batch
from replib.training.objective import reference

BlockStates = Float[Tensor, "layers tokens dim"]


class StatePair(NamedTuple):
    """Hidden states of the same tokens under the tuned model, and their goal."""

    tuned: BlockStates
    reference: Float[Tensor, "... dim"]


def widened(pair: StatePair) -> StatePair:
    """The pair in float32 or wider; in half precision norms overflow and small differences vanish.

    Raises:
        ReplibError: the states hold no token.
    """
    if not pair.tuned.shape[1]:
        raise ReplibError("no token counts in this batch: the hidden states are empty; check how it was encoded.")
    dtype = torch.promote_types(pair.tuned.dtype, torch.float32)
    return StatePair(pair.tuned.to(dtype), pair.reference.to(dtype))


def distance(
    bent: BlockStates,
    base: BlockStates,
    *,
    max_distance: float | None = None,
    directional: bool = False,
    relative: bool = False,
) -> Float[Tensor, ""]:
    """Mean L2 distance per token and layer, in float32.

    Args:
        bent: states of the tuned model.
        base: states of the model before training.
        max_distance: hinge, as a multiple of the base norm; larger distances count as this one.
        directional: whether bent states are first scaled to the base norm.
        relative: whether distances are divided by the base norm.
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


def summed_kl(chat: ChatModel, base: Tensor, bent: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(base || bent) at temperature tau, summed over tokens, from final-norm outputs ``[tokens, dim]``.

    Logits are computed a chunk of tokens at a time. With several chunks they are recomputed for the gradient.
    """
    frozen = chat.frozen or chat

    def chunk(b: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            base_logits = frozen.logits(b)
        return kl_divergence(base_logits, chat.logits(t), temperature, sequences=1)

    return torch.stack(in_chunks(chat, chunk, base, bent)).sum()


def dialogue_batch(chat: ChatModel, rows: Sequence[Dialogue]) -> Batch:
    """Prompts with their answers, each closed by an end-of-sequence token."""
    return answer_batch(chat, [(d.prompt, d.response) for d in rows])


def block_at_depth(blocks_of_32: int, depth: int) -> int:
    """Block of a model with ``depth`` blocks at the relative depth of ``blocks_of_32`` blocks out of 32."""
    return max(0, round(blocks_of_32 / 32 * depth) - 1)


def beside_reference(chat: ChatModel, batch: Batch, read: Callable[[ChatModel, Batch], BlockStates]) -> StatePair:
    """States of the model and of its reference."""
    with reference(chat) as base:
        before = read(base, batch)
    return StatePair(read(chat, batch), before)


def block_outputs(chat: ChatModel, batch: Batch, blocks: Sequence[int], *, last: int) -> BlockStates:
    """Outputs of blocks at every token but padding; the pass ends after block ``last``."""
    mask, outputs = batch.attention_mask.bool(), {}

    def keep(block: int) -> Callable[[Tensor], None]:
        def hook(hidden: Tensor) -> None:
            outputs[block] = hidden[mask]

        return hook

    forward_states(chat, batch, {("resid_post", i): keep(i) for i in blocks}, last=last)
    return torch.stack([outputs[i] for i in blocks])
