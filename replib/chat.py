"""A decoder that chats: prompts become tokens, each token's role is known, answers are generated.

ChatModel
├── blocks       the decoder blocks; block i writes resid_post[i]
├── final_norm   applied once after the last block
├── unembed      final_norm(resid_post[-1]) -> logits
└── tokenizer, render, encode, forward, generate, adapter_off
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, PreTrainedTokenizerBase

from replib.anatomy import Anatomy, find_anatomy, fingerprint, resolve, text_config
from replib.errors import ReplibError

MARK = "\ue000"  # a private-use character: stands for the instruction while a template is taken apart


@dataclass
class Batch:
    """Left-padded token ids with the masks that say which token is what. All ``[rows, tokens]``."""

    input_ids: Int[Tensor, "rows tokens"]
    attention_mask: Int[Tensor, "rows tokens"]
    position_ids: Int[Tensor, "rows tokens"]
    prompt_mask: Bool[Tensor, "rows tokens"]
    """Template and instruction, up to where the response begins."""
    post_mask: Bool[Tensor, "rows tokens"]
    """Template tokens after the instruction (part of the prompt)."""
    response_mask: Bool[Tensor, "rows tokens"]

    @property
    def last_prompt(self) -> Int[Tensor, " rows"]:
        """Column of each row's last prompt token."""
        columns = torch.arange(self.prompt_mask.shape[1], device=self.prompt_mask.device)
        return (self.prompt_mask * columns).amax(dim=1)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return self._map(lambda _, x: x.to(device))

    def rows(self, index: Int[Tensor, " chosen"]) -> Batch:
        """Some of its rows, or some several times."""
        return self._map(lambda _, x: x[index])

    def columns(self, start: int, stop: int | None) -> Batch:
        """A stretch of its columns."""
        return self._map(lambda _, x: x[:, start:stop])

    def answered(self, token: Int[Tensor, "rows 1"]) -> Batch:
        """The same rows with one more token of the answer."""
        new = {
            "input_ids": token,
            "position_ids": self.position_ids[:, -1:] + 1,
            "attention_mask": torch.ones_like(token),
        }
        new["response_mask"] = torch.ones_like(token, dtype=torch.bool)
        return self._map(lambda name, x: torch.cat([x, new.get(name, torch.zeros_like(x[:, :1]))], dim=1))

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Batch:
        return Batch(**{f.name: change(f.name, getattr(self, f.name)) for f in fields(self)})

    def inputs(self) -> dict[str, Tensor]:
        """What the model itself takes."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }


class ChatModel:
    """A decoder with its tokenizer: what every other module reads, edits and trains.

    ``model`` is the causal LM, or the PeftModel around it when an adapter is loaded.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, name: str, **about: Any):
        self.model: Any = model  # torch types the attributes of a module as tensors
        self.tokenizer, self.name = tokenizer, name
        self.revision: str | None = about.get("revision")
        self.adapter: str | None = about.get("adapter")
        self.template: str | None = about.get("template", tokenizer.chat_template)
        self.reading: Batch | None = None  # the batch in the forward pass: tells edits where the prompt ends
        self.rebind(about.get("anatomy"))

    def rebind(self, anatomy: Anatomy | None = None) -> None:
        """Find blocks, final norm and unembedding again, for example after an adapter was attached."""
        self.anatomy = anatomy or find_anatomy(self.causal_lm)
        self.blocks: list[nn.Module] = list(resolve(self.causal_lm, self.anatomy.blocks))
        self.final_norm = resolve(self.causal_lm, self.anatomy.final_norm)
        self.unembed = resolve(self.causal_lm, self.anatomy.unembed)

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model itself, inside an adapter or not."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return text_config(self.causal_lm.config).hidden_size

    @property
    def device(self) -> torch.device:
        """Device of the first parameter; inputs go there."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def context(self) -> int:
        """Longest sequence in tokens."""
        config = text_config(self.causal_lm.config)
        return getattr(config, "max_position_embeddings", None) or 1 << 30

    def provenance(self) -> dict[str, str]:
        """What a result must carry about the model that gave it."""
        return {
            "model": self.name,
            "revision": self.revision or "",
            "adapter": self.adapter or "",
            "fingerprint": fingerprint(self.causal_lm),
            "template": hashlib.sha256((self.template or "").encode()).hexdigest()[:16],
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    # ----------------------------------------------------------------------------------------- text to tokens
    def render(self, prompt: str, response: str = "", *, system: str | None = None) -> str:
        """The chat text of one user turn, ready to be answered, and the beginning of its answer."""
        if self.template is None:
            return "\n\n".join(filter(None, [system, prompt])) + response
        system_turn = [{"role": "system", "content": system}] if system else []
        turns = [*system_turn, {"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        return text + response

    def encode(
        self, prompts: Sequence[str], responses: Sequence[str] | None = None, *, system: str | None = None
    ) -> Batch:
        """Tokens and masks of prompts (and their responses), padded on the left.

        Raises ReplibError for an empty list, an empty prompt, or one longer than the context.
        """
        if not prompts:
            raise ReplibError("No prompts were given: pass at least one.")
        rows = [self._row(p, r, system) for p, r in zip(prompts, responses or [""] * len(prompts), strict=True)]
        self._check_lengths(rows)
        return _pad(rows, self.pad_id).to(self.device)

    def _row(self, prompt: str, response: str, system: str | None) -> tuple[list[int], int, int]:
        if not prompt.strip():
            raise ReplibError("A prompt is empty: remove it or give it text.")
        text = self.render(prompt, system=system)
        plain = self.template is None  # then the tokenizer adds its own special tokens; a template writes them
        found = self.tokenizer(text, add_special_tokens=plain, return_offsets_mapping=self.tokenizer.is_fast)
        ids = list(found["input_ids"])
        answer = self.tokenizer(response, add_special_tokens=False)["input_ids"] if response else []
        return ids + list(answer), len(ids), self._post_start(found, text, len(ids))

    def _post_start(self, found: Any, text: str, count: int) -> int:
        """Index of the first template token after the instruction."""
        suffix = self.render(MARK).rpartition(MARK)[2]
        if not suffix:
            return count
        if not self.tokenizer.is_fast:
            return count - len(self.tokenizer(suffix, add_special_tokens=False)["input_ids"])
        cut = len(text) - len(suffix)
        return next((i for i, (start, _) in enumerate(found["offset_mapping"]) if start >= cut), count)

    def _check_lengths(self, rows: Sequence[tuple[list[int], int, int]]) -> None:
        worst = max(range(len(rows)), key=lambda i: len(rows[i][0]))
        if len(rows[worst][0]) > self.context:
            raise ReplibError(
                f"Prompt {worst} has {len(rows[worst][0])} tokens, but {self.name} reads at most {self.context}. "
                "Shorten or drop it."
            )

    @property
    def pad_id(self) -> int:
        """The token that fills rows up."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else (self.tokenizer.eos_token_id or 0)

    # ----------------------------------------------------------------------------------------- running
    @contextmanager
    def reading_batch(self, batch: Batch) -> Iterator[None]:
        """Make ``batch`` known to hooks while it is in the forward pass."""
        before, self.reading = self.reading, batch
        try:
            yield
        finally:
            self.reading = before

    def forward(self, batch: Batch) -> Float[Tensor, "rows tokens vocab"]:
        """Next-token logits of a batch."""
        with self.reading_batch(batch):
            return self.model(**batch.inputs(), use_cache=False).logits

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 48,
        prefills: Sequence[str] | None = None,
        batch_size: int = 128,
    ) -> list[str]:
        """Greedy answers, in the order of the prompts; a prefill is where the answer is made to begin.

        The prefill is part of the returned answer. Prompts are sorted by length inside, so padding is small.
        """
        prefills = prefills or [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(prefills[i]))
        answers = [""] * len(prompts)
        for chunk in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            batch = self.encode([prompts[i] for i in chunk], [prefills[i] for i in chunk])
            for i, text in zip(chunk, self.complete(batch, max_new_tokens), strict=True):
                answers[i] = prefills[i] + text
        return answers

    def complete(self, batch: Batch, max_new_tokens: int) -> list[str]:
        """What follows each row of one batch, greedily, without special tokens."""
        ids = self.continued(batch, max_new_tokens)[:, batch.input_ids.shape[1] :]
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def continued(self, batch: Batch, max_new_tokens: int, *, past: Cache | None = None) -> Int[Tensor, "rows longer"]:
        """Token ids of each row and of its greedy answer; ``past`` holds all columns but the last, if read before."""
        with self.reading_batch(batch), evaluating(self.model):
            return self.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                past_key_values=past,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self.pad_id,
            )

    def adapter_off(self) -> AbstractContextManager:
        """Context in which the model is its own base: the adapter, if any, is switched off.

        Raises ReplibError if the adapter was merged into the weights.
        """
        if self.adapter and not hasattr(self.model, "disable_adapter"):
            raise ReplibError(f"The adapter {self.adapter} is merged into {self.name}: load the base by itself.")
        return self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside; afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _pad(rows: Sequence[tuple[list[int], int, int]], pad: int) -> Batch:
    width = max(len(ids) for ids, _, _ in rows)
    left = torch.tensor([[width - len(ids)] for ids, _, _ in rows])
    prompt = left + torch.tensor([[n] for _, n, _ in rows])
    post = left + torch.tensor([[p] for _, _, p in rows])
    column = torch.arange(width)[None]
    real = column >= left
    return Batch(
        input_ids=torch.tensor([[pad] * (width - len(ids)) + ids for ids, _, _ in rows]),
        attention_mask=real.long(),
        position_ids=(column - left).clamp(min=0),
        prompt_mask=real & (column < prompt),
        post_mask=(column >= post) & (column < prompt),
        response_mask=column >= prompt,
    )
