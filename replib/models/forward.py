"""Forward passes that compute no more than a loss reads: no unembedding, nothing above the last wanted block, and the
blocks below every adapter once instead of twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from replib.core.distributed import is_split
from replib.models.chat_model import ChatModel, evaluating
from replib.models.hooks import Hook, hooked
from replib.models.tokens import Batch, Position, Row

LEAST = 4  # tokens; a shorter beginning is not worth a pass of its own
KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)


def of_keys_and_values(cache: Cache) -> bool:
    """Whether every layer holds keys and values of each row and nothing else.

    Exactly these classes: hybrid layers inherit from them, and a recurrent state cannot be lent or selected by row.
    """
    return isinstance(cache, DynamicCache) and all(type(layer) in KEYS_AND_VALUES for layer in cache.layers)


class _Lent(DynamicLayer):
    """Keys and values of one row, lent to every row of a batch; what the batch adds is not kept."""

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.is_sliding = layer.is_sliding

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_more: Any) -> tuple[Tensor, Tensor]:
        """The lent ones, followed by those of the batch."""
        rows = len(keys)
        lent_keys, lent_values = (x.expand(rows, -1, -1, -1) for x in (self.keys, self.values))
        return torch.cat([lent_keys, keys], dim=-2), torch.cat([lent_values, values], dim=-2)


@dataclass(frozen=True)
class SharedPrefix:
    """The keys and values of the first ``length`` tokens of every row."""

    length: int
    cache: Cache

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model takes to read a batch of what follows."""
        read = torch.ones(len(batch.input_ids), self.length, dtype=torch.long, device=batch.input_ids.device)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": torch.cat([read, batch.attention_mask], dim=1),
            "position_ids": batch.position_ids + self.length,
            "past_key_values": self.cache,
        }


@torch.no_grad()
def read_beginning(model: ChatModel, ids: Sequence[int], longest: int) -> SharedPrefix | None:
    """Read the first tokens of all rows, for rows of at most ``longest`` tokens in all.

    None where their state is more than keys and values, or where a sliding window would forget part of them.
    """
    out = model.causal_lm.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=True)
    cache = out.past_key_values
    if not of_keys_and_values(cache):
        return None
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    if any(layer.keys is None for layer in cache.layers) or min(windows, default=longest) < longest:
        return None
    return SharedPrefix(len(ids), Cache(layers=[_Lent(layer) for layer in cache.layers]))


def shared_length(rows: Sequence[Row], positions: Sequence[Position]) -> int:
    """How many tokens all rows begin with, none of them wanted; 0 if it is not worth a pass."""
    length = min(min(len(row) - 1, *(_first_wanted(row, p) for p in positions)) for row in rows)
    first = rows[0].ids
    for row in rows:
        while length > 0 and row.ids[:length] != first[:length]:
            length -= 1
    return length if length >= LEAST and len(rows) > 1 else 0


def _first_wanted(row: Row, position: Position) -> int:
    """Index of the first token that a position reads."""
    if isinstance(position, int):
        return row.prompt + position
    return row.prompt - 1 if position == "last_prompt" else row.span(position).start


def untouched(model: ChatModel) -> bool:
    """Whether no hook acts on the model: one might, and it would not know that a beginning is missing."""
    return not any(
        hook.__module__ != "transformers.utils.output_capturing"  # left behind by transformers, and at rest
        for module in model.model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


LOGITS = 1 << 24  # numbers that the logits of one stretch of tokens hold at most


class _Enough(Exception):
    """All that is wanted has been read."""


def forward_states(
    chat: ChatModel, batch: Batch, hooks: Mapping[tuple[str, int], Hook] | None = None, *, last: int | None = None
) -> Tensor | None:
    """Run a batch through the model under hooks.

    Args:
        chat: the model.
        batch: padded rows.
        hooks: called with the hidden states ``[rows, tokens, dim]`` at (site, block), see ``replib.models.hooks``.
        last: block after which the pass may stop; None goes to the end, as does a model whose weights are split
            over processes: a pass that breaks off would leave some of them gathered.

    Returns:
        What left the final norm, ``[rows, tokens, dim]``, for ``chat.logits``; None where the pass was stopped.
    """
    final: list[Tensor] = []

    def stop(*_: object) -> None:
        raise _Enough

    taps = [chat.final_norm.register_forward_hook(lambda _m, _a, out: final.append(out))]
    try:
        with hooked(chat, dict(hooks or {})), chat.reading_batch(batch):
            if last is not None and not is_split(chat.model):
                taps.append(chat.blocks[last].register_forward_hook(stop))
            chat.model(**batch.inputs(), use_cache=False, logits_to_keep=1)
    except _Enough:
        return None
    finally:
        for tap in taps:
            tap.remove()
    return final[-1]  # where sites are looked for, a prompt passes before


def in_chunks(chat: ChatModel, compute: Callable[..., Tensor], *rows: Tensor) -> list[Tensor]:
    """What is computed on rows whose logits are made there, a stretch of them at a time.

    Where there are several stretches, each is computed anew for the gradient, so that one at a time holds its logits.
    """
    size = stretch_of(chat)
    if len(rows[0]) <= size:
        return [compute(*rows)]
    each = zip(*(x.split(size) for x in rows), strict=True)
    return [checkpoint(compute, *some, use_reentrant=False) for some in each]


def stretch_of(chat: ChatModel) -> int:
    """Tokens whose logits are made at once."""
    return max(1, LOGITS // chat.unembed.out_features)


@contextmanager
def cache_frozen_blocks(chat: ChatModel) -> Iterator[None]:
    """Inside, blocks below every adapter compute the first pass of a batch alone; the next one takes what they gave.

    With and without the adapter they read the same: first comes the reference, then the model in training.
    """
    with ExitStack() as stack:
        for block in below_adapters(chat):
            before = vars(block).get("forward")
            block.forward = _once(block.forward)
            stack.callback(_undo, block, before)
        yield


@contextmanager
def without_checkpointing(chat: ChatModel) -> Iterator[None]:
    """Inside, blocks keep what the gradient needs: computed anew, they would not meet edits that are gone by then."""
    modules = [m for m in chat.model.modules() if getattr(m, "gradient_checkpointing", False)]
    try:
        for module in modules:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


def below_adapters(chat: ChatModel) -> list[nn.Module]:
    """The first blocks, as far as nothing in them or before them is trained; none where weights are split."""
    if is_split(chat.model) or any(p.requires_grad for p in chat.causal_lm.get_input_embeddings().parameters()):
        return []
    return list(takewhile(lambda block: not any(p.requires_grad for p in block.parameters()), chat.blocks))


def _once(forward: Callable) -> Callable:
    given: list[Any] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if not given:
            given.append(forward(*args, **kwargs))
        return given[0]

    return run


def _undo(block: nn.Module, before: Callable | None) -> None:
    if before is None:
        del block.forward
    else:
        block.forward = before


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
    final = forward_states(chat, batch)
    assert final is not None  # the pass went to the end
    return final[:, :-1][batch.response_mask[:, 1:]]


def token_losses(
    chat: ChatModel, states: Float[Tensor, "answered dim"], tokens: Int[Tensor, " answered"]
) -> Float[Tensor, " answered"]:
    """−log p of each token, nats. Logits are made a stretch at a time; if there are several, anew for the gradient."""

    def stretch(s: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(chat.logits(s), t, reduction="none")

    return torch.cat(in_chunks(chat, stretch, states, tokens))


def answer_logp(chat: ChatModel, batch: Batch) -> Float[Tensor, " rows"]:
    """Summed log-probability of each row's answer, nats."""
    losses = token_losses(chat, answer_states(chat, batch), answer_tokens(batch))
    row = batch.response_mask.nonzero()[:, 0]
    return losses.new_zeros(len(batch.input_ids)).index_add(0, row, -losses)


@dataclass(frozen=True)
class Prefix:
    """A batch of prompts, and the cache of all their tokens but the last."""

    model: ChatModel
    batch: Batch
    cache: Cache

    @property
    def whole(self) -> bool:
        """Whether the cache is one of keys and values in every layer, and every prompt has a token in it."""
        return of_keys_and_values(self.cache) and bool((self.batch.attention_mask.sum(1) > 1).all())

    @classmethod
    @torch.no_grad()
    def read(cls, model: ChatModel, prompts: Sequence[str]) -> Prefix:
        """Read prompts, without any edit in place."""
        batch = model.encode(prompts)
        with evaluating(model.model):
            out = model.model(**batch.columns(0, -1).inputs(), use_cache=True, logits_to_keep=1)
        return cls(model, batch, out.past_key_values)

    def copies(self, n: int) -> tuple[Batch, Cache]:
        """All prompts, n times over, and a cache of its own for them: what ``ChatModel.replied`` takes."""
        rows = torch.arange(len(self.batch.input_ids), device=self.batch.input_ids.device).repeat(n)
        cache = deepcopy(self.cache)
        cache.batch_select_indices(rows)
        return self.batch.rows(rows), cache
