"""Chat model: a decoder with its tokenizer, chat template, token roles and generation.

ChatModel
├── blocks       the decoder blocks; block i writes resid_post[i]
├── final_norm   applied once after the last block
├── unembed      final_norm(resid_post[-1]) -> logits
└── tokenizer, render, tokenize, encode, forward, generate, written, adapter_off
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from replib.core.errors import ReplibError
from replib.models.architecture import Architecture, adapter_hash, find_architecture, fingerprint, resolve, text_config
from replib.models.chat_template import Template
from replib.models.hook_points import find_hook_points
from replib.models.tokens import Batch, Row, fitted, padded


class ChatModel:
    """Decoder with its tokenizer, the object that every other module reads, edits or trains.

    ``model`` is the causal LM, or the PeftModel around it when an adapter is loaded.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, name: str, **about: Any):
        self.model: Any = model  # torch types attributes of modules as tensors
        self.tokenizer, self.name = tokenizer, name
        self.revision: str | None = about.get("revision")
        self.adapter: str | None = about.get("adapter")
        self.merged: str = about.get("merged", "")  # hash of the adapter merged into the weights
        self.template: str | None = about.get("template", tokenizer.chat_template)
        self.reading: Batch | None = None  # batch in the forward pass; edits take the end of the prompt from it
        self.readings = 0  # batches read so far; distinguishes a one-token prompt from an answer token
        self.as_base = False  # whether the adapter is switched off
        self.frozen: ChatModel | None = None  # copy from before full-weight training
        self.architecture: Architecture = about.get("architecture") or find_architecture(self.causal_lm)
        self.blocks: list[nn.Module] = list(resolve(self.causal_lm, self.architecture.blocks))
        self.final_norm = resolve(self.causal_lm, self.architecture.final_norm)
        self.unembed = resolve(self.causal_lm, self.architecture.unembed)
        with evaluating(model):
            self.hook_points = find_hook_points(model, self.blocks, self._probe())

    def _probe(self) -> dict[str, Tensor]:
        """Inputs of a short probe pass, on the meta device if the model has no weights."""
        no_weights = all(p.is_meta for p in self.model.parameters()) and not hasattr(self.causal_lm, "hf_device_map")
        rows = list(Template(self.tokenizer, None).rows(["a b"]))
        return padded(rows, self.pad_id).to(torch.device("meta") if no_weights else self.device).inputs()

    def rebind(self, model: nn.Module, *, adapter: str | None = None, merged: str = "") -> ChatModel:
        """Chat model around another module, for example with an adapter attached; its parts are located again.

        Args:
            model: a causal LM of the same architecture, or a PeftModel around it.
            adapter: name of its adapter, attached or merged.
            merged: hash of the adapter merged into its weights.
        """
        about = {"revision": self.revision, "template": self.template, "architecture": self.architecture}
        return ChatModel(model, self.tokenizer, name=self.name, adapter=adapter, merged=merged, **about)

    @property
    def causal_lm(self) -> Any:
        """Hugging Face model, without adapter or compile wrappers."""
        model = self.model._orig_mod if hasattr(self.model, "_orig_mod") else self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

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
        """Device of the first parameter in memory, where inputs go."""
        return next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the unquantised weights."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def context(self) -> int:
        """Maximum sequence length, tokens."""
        config = text_config(self.causal_lm.config)
        return getattr(config, "max_position_embeddings", None) or 1 << 30

    def provenance(self) -> dict[str, str]:
        """Provenance of the model, for its results."""
        return {
            "model": self.name,
            "revision": self.revision or "",
            "adapter": "" if self.as_base else self.adapter or "",
            "adapter_hash": "" if self.as_base else self.merged or adapter_hash(self.model),
            "fingerprint": fingerprint(self.causal_lm),
            "template": hashlib.sha256((self.template or "").encode()).hexdigest()[:16],
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def render(self, prompt: str, response: str = "", *, system: str | None = None) -> str:
        """Chat text of one user turn up to the answer, followed by ``response``."""
        return Template(self.tokenizer, self.template).render([prompt], system)[0] + response

    def tokenize(
        self,
        prompts: Sequence[str],
        responses: Sequence[str] | None = None,
        *,
        system: str | None = None,
        overflow: str = "refuse",
    ) -> list[Row]:
        """Token ids of prompts (and their responses), with the borders of instruction and response.

        Args:
            prompts: instructions as text; a control token spelled in one is tokenised as ordinary text.
            responses: one text per prompt, tokenised separately; control tokens in it keep their meaning.
            system: system prompt of all prompts.
            overflow: "refuse" a prompt longer than the context, or "truncate" its instruction with a warning.

        Raises:
            ReplibError: no prompts, an empty prompt, a prompt longer than the context, a template that rejects the
                turn.
        """
        if isinstance(prompts, str) or not prompts:
            raise ReplibError("No prompts were given: pass a list of at least one.")
        if responses is not None and len(responses) != len(prompts):
            raise ReplibError(f"{len(prompts)} prompts and {len(responses)} responses: give each prompt one.")
        rows = list(Template(self.tokenizer, self.template).rows(prompts, system))
        if responses is not None and any(responses):
            answers = self.tokenizer(list(responses), add_special_tokens=False)["input_ids"]
            # Some tokenizers give a token for an empty text.
            rows = [row.answered(a if r else []) for row, a, r in zip(rows, answers, responses, strict=True)]
        return fitted(rows, self.context, overflow, self.name)

    def pad(self, rows: Sequence[Row]) -> Batch:
        """Batch of rows of ``tokenize``, on the model's device."""
        return padded(rows, self.pad_id).to(self.device)

    def encode(
        self,
        prompts: Sequence[str],
        responses: Sequence[str] | None = None,
        *,
        system: str | None = None,
        overflow: str = "refuse",
    ) -> Batch:
        """Tokens and masks of prompts (and their responses), padded on the left: ``pad(tokenize(...))``."""
        return self.pad(self.tokenize(prompts, responses, system=system, overflow=overflow))

    @property
    def pad_id(self) -> int:
        """Token id for padding."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else (self.tokenizer.eos_token_id or 0)

    @contextmanager
    def reading_batch(self, batch: Batch) -> Iterator[None]:
        """Expose ``batch`` to hooks during its forward pass."""
        before, self.reading = self.reading, batch
        self.readings += 1
        try:
            yield
        finally:
            self.reading = before

    def forward(self, batch: Batch, inputs: dict[str, Any] | None = None) -> Float[Tensor, "rows tokens vocab"]:
        """Next-token logits of a batch; ``inputs`` replaces ``batch.inputs()`` as the model's arguments."""
        with self.reading_batch(batch):
            return self.model(**(inputs or batch.inputs()), use_cache=False).logits

    def decode(self, hidden: Float[Tensor, "... dim"]) -> Float[Tensor, "... vocab"]:
        """Logits of residual vectors, float32: final norm, unembedding, scaling and capping of the architecture."""
        return self.logits(self.final_norm(hidden))

    def logits(self, normed: Float[Tensor, "... dim"]) -> Float[Tensor, "... vocab"]:
        """Logits of final-norm outputs, float32: unembedding, scaling and capping of the architecture."""
        logits = self.unembed(normed).float()
        config = text_config(self.causal_lm.config).to_dict()
        logits = logits * (config.get("logit_scale") or 1.0)  # Cohere
        logits = logits / (config.get("logits_scaling") or 1.0)  # Granite
        cap = config.get("final_logit_softcapping")  # Gemma
        return cap * torch.tanh(logits / cap) if cap else logits

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 48,
        prefills: Sequence[str] | None = None,
        batch_size: int = 128,
    ) -> list[str]:
        """Greedy answers, in the order of the prompts; each begins with its prefill, if given.

        Batches hold prompts of similar length, to limit padding.
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
        """Greedy continuation of each row, without special tokens."""
        return self.replied(batch, max_new_tokens)[1]

    def replied(
        self, batch: Batch, max_new_tokens: int, *, past: Cache | None = None
    ) -> tuple[Float[Tensor, "rows vocab"], list[str]]:
        """First-token logits, float32, and greedy continuation of each row, from one pass."""
        first = _First()
        ids = self.continued(batch, max_new_tokens, past=past, first=first)[:, batch.input_ids.shape[1] :]
        assert first.logits is not None, "something was generated"
        return first.logits, self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    @torch.no_grad()
    def continued(
        self, batch: Batch, max_new_tokens: int, *, past: Cache | None = None, first: LogitsProcessor | None = None
    ) -> Int[Tensor, "rows longer"]:
        """Token ids of each row and its greedy answer; ``past`` caches all columns but the last."""
        read = batch if past is None else batch.columns(-1, None)
        with self.reading_batch(read), evaluating(self.model):
            return self.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                past_key_values=past,
                logits_processor=LogitsProcessorList([first] if first else []),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,  # a value from the generation config would make the answer not greedy
                no_repeat_ngram_size=0,
                num_beams=1,
                pad_token_id=self.pad_id,
            )

    def written(self, batch: Batch, max_new_tokens: int) -> Batch:
        """Rows, each followed by the model's greedy answer as its response.

        From the end-of-sequence token on, ``attention_mask`` is 0 and ``response_mask`` False.
        """
        new = self.continued(batch, max_new_tokens)[:, batch.input_ids.shape[1] :]
        return batch.answered(new, ~self.ends(new).cumsum(dim=1).bool())

    def ends(self, tokens: Int[Tensor, "rows tokens"]) -> Bool[Tensor, "rows tokens"]:
        """Mask of the end-of-sequence tokens; all False if the model has none."""
        ends = self.model.generation_config.eos_token_id
        return torch.isin(tokens, torch.tensor([] if ends is None else ends, device=tokens.device).long())

    def adapter_off(self) -> AbstractContextManager:
        """Context in which the adapter, if any, is switched off.

        Raises ReplibError if the adapter was merged into the weights.
        """
        if self.adapter and not hasattr(self.model, "disable_adapter"):
            raise ReplibError(f"The adapter {self.adapter} is merged into {self.name}: load the base by itself.")
        return self._without_adapter() if hasattr(self.model, "disable_adapter") else nullcontext()

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        before, self.as_base = self.as_base, True
        try:
            with self.model.disable_adapter():
                yield
        finally:
            self.as_base = before


class _First(LogitsProcessor):
    """Records the logits of the first generated token."""

    logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        self.logits = scores if self.logits is None else self.logits
        return scores


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context in eval mode (no dropout); restores the earlier mode on exit."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def check_layers(model: ChatModel, layers: Sequence[int] | range) -> list[int]:
    """Layers as indices from 0, or an error that names the range."""
    bad = [i for i in layers if not -model.n_layers <= i < model.n_layers]
    if bad or not len(layers):
        raise ReplibError(
            f"Layer {bad[0] if bad else '(none)'} is not in {model.name}: it has {model.n_layers} blocks, "
            f"0 to {model.n_layers - 1} (or -1 to {-model.n_layers} from the end)."
        )
    return [i % model.n_layers for i in layers]
