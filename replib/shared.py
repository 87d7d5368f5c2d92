"""The beginning that all prompts share, most often the template's, read once for all of them.

Chat templates open every prompt with the same tokens, system prompts with many more. Their keys and values are the
same in every row, so only what follows is read: the results are those of reading everything, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from replib.chat import ChatModel
from replib.positions import Position
from replib.tokens import Batch, Row

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
class Beginning:
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
def read_beginning(model: ChatModel, ids: Sequence[int], longest: int) -> Beginning | None:
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
    return Beginning(len(ids), Cache(layers=[_Lent(layer) for layer in cache.layers]))


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
