"""Forward passes that compute no more than a loss reads, and log-probabilities of answers.

No pass computes the logits of the whole vocabulary for tokens that no loss reads, or blocks above the last wanted one;
frozen blocks below every adapter run once instead of twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from replib.core.distributed import is_split
from replib.models.chat_model import ChatModel
from replib.models.hooks import Hook, hooked
from replib.models.tokens import Batch

LOGITS = 1 << 24  # largest number of logits (tokens x vocabulary) that one chunk holds


class StopForward(Exception):
    """Raised in a hook to end a forward pass after the last wanted block."""


def forward_states(
    chat: ChatModel, batch: Batch, hooks: Mapping[tuple[str, int], Hook] | None = None, *, last: int | None = None
) -> Tensor | None:
    """Run a batch through the model under hooks.

    Args:
        chat: the model.
        batch: padded rows.
        hooks: called with the hidden states ``[rows, tokens, dim]`` at (site, block), see ``replib.models.hooks``.
        last: block after which the pass stops; None runs to the end. A model whose weights are split over processes
            always runs to the end, because an interrupted pass would leave some weights gathered.

    Returns:
        Output of the final norm, ``[rows, tokens, dim]``, for ``chat.logits``; None if the pass was stopped.
    """
    final: list[Tensor] = []

    def stop(*_: object) -> None:
        raise StopForward

    handles = [chat.final_norm.register_forward_hook(lambda _m, _a, out: final.append(out))]
    try:
        with hooked(chat, dict(hooks or {})), chat.reading_batch(batch):
            if last is not None and not is_split(chat.model):
                handles.append(chat.blocks[last].register_forward_hook(stop))
            chat.model(**batch.inputs(), use_cache=False, logits_to_keep=1)
    except StopForward:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return final[0]


def in_chunks(chat: ChatModel, compute: Callable[..., Tensor], *rows: Tensor) -> list[Tensor]:
    """Results of ``compute`` on chunks of rows whose logits fit into memory.

    Several chunks are recomputed for the gradient, so that only one of them holds its logits at a time.
    """
    size = chunk_size(chat)
    if len(rows[0]) <= size:
        return [compute(*rows)]
    chunks = zip(*(x.split(size) for x in rows), strict=True)
    return [checkpoint(compute, *chunk, use_reentrant=False) for chunk in chunks]


def chunk_size(chat: ChatModel) -> int:
    """Number of tokens whose logits are computed at once."""
    return max(1, LOGITS // chat.unembed.out_features)


@contextmanager
def cache_frozen_blocks(chat: ChatModel) -> Iterator[None]:
    """Reuse the outputs of the blocks below every adapter in the second pass of the same batch.

    These blocks give the same with the adapter (the model in training) and without it (the reference, read first).
    """
    with ExitStack() as stack:
        for block in below_adapters(chat):
            before = vars(block).get("forward")
            block.forward = _once(block.forward)
            stack.callback(_undo, block, before)
        yield


@contextmanager
def without_checkpointing(chat: ChatModel) -> Iterator[None]:
    """Switch gradient checkpointing off; recomputed activations would miss edits already removed."""
    modules = [m for m in chat.model.modules() if getattr(m, "gradient_checkpointing", False)]
    try:
        for module in modules:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def below_adapters(chat: ChatModel) -> list[nn.Module]:
    """Blocks before the first trained parameter; none if weights are split over processes."""
    if is_split(chat.model) or any(p.requires_grad for p in chat.causal_lm.get_input_embeddings().parameters()):
        return []
    return list(takewhile(lambda block: not any(p.requires_grad for p in block.parameters()), chat.blocks))


def _once(forward: Callable) -> Callable:
    outputs: list[Any] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if not outputs:
            outputs.append(forward(*args, **kwargs))
        return outputs[0]

    return run


def _undo(block: nn.Module, before: Callable | None) -> None:
    if before is None:
        del block.forward
    else:
        block.forward = before


def answer_batch(chat: ChatModel, pairs: Iterable[tuple[str, str]]) -> Batch:
    """Prompts and their answers as one batch, each answer with its end-of-sequence token."""
    prompts, answers = zip(*pairs, strict=True)
    end = chat.tokenizer.eos_token or ""
    return chat.encode(prompts, [answer + end for answer in answers])


def answer_tokens(batch: Batch) -> Int[Tensor, " answered"]:
    """Ids of the answers' tokens, row after row."""
    return batch.input_ids[batch.response_mask]


def answer_states(chat: ChatModel, batch: Batch) -> Float[Tensor, "answered dim"]:
    """Outputs of the final norm that predict the tokens of ``answer_tokens``, for ``chat.logits``.

    Each is one token earlier: the last token of the prompt predicts the first of the answer.
    """
    final = forward_states(chat, batch)
    assert final is not None  # the pass went to the end
    return final[:, :-1][batch.response_mask[:, 1:]]


def token_losses(
    chat: ChatModel, states: Float[Tensor, "answered dim"], tokens: Int[Tensor, " answered"]
) -> Float[Tensor, " answered"]:
    """−log p of each token, nats. Logits are computed in chunks; several chunks are recomputed for the gradient."""

    def losses(s: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(chat.logits(s), t, reduction="none")

    return torch.cat(in_chunks(chat, losses, states, tokens))


def answer_logp(chat: ChatModel, batch: Batch) -> Float[Tensor, " rows"]:
    """Summed log-probability of each row's answer, nats."""
    losses = token_losses(chat, answer_states(chat, batch), answer_tokens(batch))
    row = batch.response_mask.nonzero()[:, 0]
    return losses.new_zeros(len(batch.input_ids)).index_add(0, row, -losses)
