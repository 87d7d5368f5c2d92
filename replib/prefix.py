"""Prompts read once, up to their last token: an edit of that token alone is scored without reading the rest again.

Whatever acts at the last prompt token leaves the keys and values of the tokens before it as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache

from replib.chat import Batch, ChatModel, evaluating
from replib.shared import of_keys_and_values


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

    def first_logits(self, copies: int = 1) -> Float[Tensor, "rows vocab"]:
        """Logits of the first answer token under the edits now in place: all prompts, ``copies`` times over."""
        return self._decide(copies)[0]

    @torch.no_grad()
    def answers(self, copies: int = 1, *, max_new_tokens: int) -> list[str]:
        """Greedy answers under the edits now in place, in the order of ``first_logits``."""
        logits, batch, cache = self._decide(copies)
        first, chat = logits.argmax(-1, keepdim=True), self.model
        ids = chat.continued(batch.answered(first), max_new_tokens - 1, past=cache)[:, batch.input_ids.shape[1] :]
        ids[self._ends(first), 1:] = chat.pad_id
        return chat.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def _ends(self, first: Tensor) -> Tensor:
        """Rows whose answer is over with its first token."""
        ends = self.model.model.generation_config.eos_token_id
        return torch.isin(first[:, 0], torch.tensor([] if ends is None else ends, device=first.device).long())

    @torch.no_grad()
    def _decide(self, copies: int) -> tuple[Tensor, Batch, Cache]:
        rows = torch.arange(len(self.batch.input_ids), device=self.batch.input_ids.device).repeat(copies)
        batch, cache = self.batch.rows(rows), deepcopy(self.cache)
        cache.batch_select_indices(rows)
        inputs = batch.columns(-1, None).inputs() | {"attention_mask": batch.attention_mask}
        with self.model.reading_batch(batch.columns(-1, None)), evaluating(self.model.model):
            out = self.model.model(**inputs, past_key_values=cache, use_cache=True)
        return out.logits[:, -1], batch, cache
