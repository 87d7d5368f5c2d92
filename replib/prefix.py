"""Prompts read once, up to their last token: an edit of that token alone is scored without reading the rest again.

Whatever acts at the last prompt token leaves the keys and values of the tokens before it as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import Cache

from replib.chat import ChatModel, evaluating
from replib.shared import of_keys_and_values
from replib.tokens import Batch


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
