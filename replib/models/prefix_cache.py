"""Key-value caches of prompt beginnings: one row read for a whole batch, and whole prompts read for many edits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from replib.models.chat_model import ChatModel, evaluating
from replib.models.tokens import SPANS, Batch, Position, Row

_SHORTEST = 4  # tokens; a shorter prefix is not worth a pass of its own
_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)


def _holds_keys_and_values(cache: Cache) -> bool:
    """Whether every layer holds keys and values of each row and nothing else.

    Exactly these classes: hybrid layers inherit from them, and a recurrent state cannot be lent or selected by row.
    """
    return isinstance(cache, DynamicCache) and all(type(layer) in _KEYS_AND_VALUES for layer in cache.layers)


class _LentLayer(DynamicLayer):
    """Keys and values of one row, lent to every row of a batch; it does not store those of the batch."""

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.is_sliding = layer.is_sliding

    def update(self, keys: Tensor, values: Tensor, *_args: Any, **_more: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the prefix, followed by those of the batch."""
        rows = len(keys)
        lent_keys, lent_values = (x.expand(rows, -1, -1, -1) for x in (self.keys, self.values))
        return torch.cat([lent_keys, keys], dim=-2), torch.cat([lent_values, values], dim=-2)


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of the first ``length`` tokens of every row."""

    length: int
    cache: Cache

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Arguments of the model for a batch of the tokens after the prefix."""
        read = torch.ones(len(batch.input_ids), self.length, dtype=torch.long, device=batch.input_ids.device)
        return {
            "input_ids": batch.input_ids,
            "attention_mask": torch.cat([read, batch.attention_mask], dim=1),
            "position_ids": batch.position_ids + self.length,
            "past_key_values": self.cache,
        }


@torch.no_grad()
def read_prefix(model: ChatModel, ids: Sequence[int], longest: int) -> SharedPrefix | None:
    """Read the first tokens of all rows, for rows of at most ``longest`` tokens in all.

    None if their state is more than keys and values, or if a sliding window would forget part of them.
    """
    out = model.causal_lm.base_model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=True)
    cache = out.past_key_values
    if not _holds_keys_and_values(cache):
        return None
    windows = [layer.sliding_window for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    if any(layer.keys is None for layer in cache.layers) or min(windows, default=longest) < longest:
        return None
    return SharedPrefix(len(ids), Cache(layers=[_LentLayer(layer) for layer in cache.layers]))


def shared_length(rows: Sequence[Row], positions: Sequence[Position]) -> int:
    """Number of tokens that all rows begin with and no position reads; 0 if they are not worth a pass."""
    unread = min(min(len(row) - 1, *(_first_read(row, p) for p in positions)) for row in rows)
    length = len(os.path.commonprefix([row.ids[: max(0, unread)] for row in rows]))
    return length if length >= _SHORTEST and len(rows) > 1 else 0


def _first_read(row: Row, position: Position) -> int:
    """Index of the first token that a position reads."""
    if isinstance(position, int):
        return row.prompt + position
    return row.prompt - 1 if position == "last_prompt" else SPANS[position].of_row(row).start


def has_no_hooks(model: ChatModel) -> bool:
    """Whether no hook acts on the model; a hook on tokens would not know that the prefix is missing."""
    return not any(
        hook.__module__ != "transformers.utils.output_capturing"  # transformers leaves these behind, without effect
        for module in model.model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


@dataclass(frozen=True)
class CachedPrompts:
    """A batch of prompts, and the cache of all their tokens but the last."""

    model: ChatModel
    batch: Batch
    cache: Cache

    @property
    def complete(self) -> bool:
        """Whether every layer caches keys and values alone, and every prompt has a token in the cache."""
        return _holds_keys_and_values(self.cache) and bool((self.batch.attention_mask.sum(1) > 1).all())

    @classmethod
    @torch.no_grad()
    def read(cls, model: ChatModel, prompts: Sequence[str]) -> CachedPrompts:
        """Read prompts, without any edit in place."""
        batch = model.encode(prompts)
        with evaluating(model.model):
            out = model.model(**batch.columns(0, -1).inputs(), use_cache=True, logits_to_keep=1)
        return cls(model, batch, out.past_key_values)

    def copies(self, n: int) -> tuple[Batch, Cache]:
        """All prompts, n times over, with a cache of their own, for ``ChatModel.replied``."""
        rows = torch.arange(len(self.batch.input_ids), device=self.batch.input_ids.device).repeat(n)
        cache = deepcopy(self.cache)
        cache.batch_select_indices(rows)
        return self.batch.rows(rows), cache
