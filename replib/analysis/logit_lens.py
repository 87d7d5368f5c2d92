"""Logit lens: next-token prediction after each block, of one model or of base and bent model.

    p[l, t] = softmax(unembed(final_norm(resid_post[l, t])))      (nostalgebraist 2020; RepBend, Fig. 3)

Hooks read the residual stream before the final norm, which is applied once, so the last block gives the model's own
prediction. Entropies and divergences are in nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replib.analysis.divergence import js_discrete
from replib.core.errors import ReplibError
from replib.core.storage import versions
from replib.models.chat_model import ChatModel, check_layers
from replib.models.hooks import Hook, hooked
from replib.models.tokens import Batch

_LENS_CHUNK = 256  # readings decoded at once: 131 MB in float32 for a vocabulary of 128k, whatever the number of layers


@dataclass(frozen=True)
class LensTrajectory:
    """Prediction of each block after each token: row l is block `layers[l]`, column t token `tokens[t]`."""

    tokens: tuple[str, ...]
    """Tokens of the chat; column t predicts the token after it."""
    layers: tuple[int, ...]
    entropy: Float[Tensor, "layers tokens"]
    """Nats, from 0 to ln(vocabulary)."""
    top_tokens: tuple[tuple[tuple[str, ...], ...], ...]
    """[layers][tokens][top] most probable next tokens, best first."""
    top_probs: Float[Tensor, "layers tokens top"]
    next_prob: Float[Tensor, "layers tokens"]
    """Probability of the token that follows; NaN after the last one."""
    next_rank: Int[Tensor, "layers tokens"]
    """Number of tokens more probable than that one: 0 is the first choice; -1 after the last."""
    provenance: dict[str, str]

    @property
    def words(self) -> list[list[str]]:
        """[layers][tokens] most probable next token, as text."""
        return [[best[0] for best in row] for row in self.top_tokens]


@dataclass(frozen=True)
class LensComparison:
    """Lenses of the base (adapter off) and the bent model (adapter on) on the same tokens."""

    base: LensTrajectory
    bent: LensTrajectory
    js: Float[Tensor, "layers tokens"]
    """Jensen-Shannon divergence of the two, nats, from 0 to ln 2."""


@torch.no_grad()
def logit_lens(
    model: ChatModel,
    prompt: str,
    response: str = "",
    *,
    layers: Sequence[int] | None = None,
    top: int = 5,
    span: str = "all",
) -> LensTrajectory:
    """Read every layer of one chat, a prompt with an optional forced response.

    Args:
        model: model to read; wrap the call in `model.adapter_off()` to read its base.
        prompt: the user's turn, as text; the chat template is applied here.
        response: the beginning of the answer.
        layers: block indices, default all; negative ones count from the last.
        top: number of most probable tokens to keep.
        span: "all", "prompt", or "response", which starts at the last prompt token since that one predicts the
            first response token.

    Raises:
        ReplibError: unknown span or layer, a bad `top`, or logits that differ from the decoded last block.
    """
    window = _window(model, prompt, response, layers=layers, span=span)
    stream = _stream(model, window)
    parts = [_measure(model.decode(hidden), ids, top) for hidden, ids in _chunks(stream, window)]
    return _trajectory(model, window, parts)


@torch.no_grad()
def compare(
    model: ChatModel,
    prompt: str,
    response: str = "",
    *,
    layers: Sequence[int] | None = None,
    top: int = 5,
    span: str = "response",
) -> LensComparison:
    """Read one chat twice, adapter off and on; arguments as in `logit_lens`.

    Raises:
        ReplibError: as `logit_lens`, or a model without an adapter.
    """
    if not hasattr(model.model, "disable_adapter"):
        raise ReplibError(f"{model.name} has no adapter to compare with its base: load(..., adapter=folder).")
    window = _window(model, prompt, response, layers=layers, span=span)
    with model.adapter_off():
        base_stream = _stream(model, window)
    pairs = zip(_chunks(base_stream, window), _chunks(_stream(model, window), window), strict=True)
    parts = [_measure_pair(model, base, bent, ids, top) for (base, ids), (bent, _) in pairs]
    base_parts, bent_parts, js = zip(*parts, strict=True)
    bent = _trajectory(model, window, bent_parts)
    base = replace(_trajectory(model, window, base_parts), provenance=bent.provenance | {"adapter": ""})
    return LensComparison(base, bent, torch.cat(js).reshape(bent.entropy.shape))


class _Window(NamedTuple):
    """Tokens of one chat, and the blocks and columns to read."""

    batch: Batch
    layers: list[int]
    columns: slice

    @property
    def ids(self) -> list[int]:
        return self.batch.input_ids[0, self.columns].tolist()

    @property
    def next_ids(self) -> Tensor:
        """The token after each column; -1 after the last of the chat."""
        return torch.nn.functional.pad(self.batch.input_ids[0, 1:], (0, 1), value=-1)[self.columns]


class _Part(NamedTuple):
    """Lens outputs of some readings, a row each."""

    entropy: Float[Tensor, " readings"]
    top_probs: Float[Tensor, "readings top"]
    top_ids: Int[Tensor, "readings top"]
    next_prob: Float[Tensor, " readings"]
    next_rank: Int[Tensor, " readings"]


def _window(model: ChatModel, prompt: str, response: str, *, layers: Sequence[int] | None, span: str) -> _Window:
    blocks = check_layers(model, range(model.n_layers) if layers is None else layers)
    batch = model.encode([prompt], [response])
    begin, end = int(batch.last_prompt[0]), batch.input_ids.shape[1]
    columns = {"all": slice(0, end), "prompt": slice(0, begin + 1), "response": slice(begin, end)}
    if span not in columns:
        raise ReplibError(f"Unknown span {span!r}: use one of {', '.join(columns)}.")
    return _Window(batch, blocks, columns[span])


def _stream(model: ChatModel, window: _Window) -> Float[Tensor, "layers tokens dim"]:
    """Raw block outputs, from one forward pass."""
    streams: dict[int, Tensor] = {}

    def reader(layer: int) -> Hook:
        def read(hidden: Tensor) -> None:
            streams[layer] = hidden[0, window.columns]

        return read

    last = model.n_layers - 1
    with hooked(model, {("resid_post", i): reader(i) for i in {*window.layers, last}}):
        logits = model.forward(window.batch)
    _check_decoding(model, streams[last][-1:], logits[0, window.columns][-1:])
    return torch.stack([streams[i].to(logits.device) for i in window.layers])


def _check_decoding(model: ChatModel, hidden: Tensor, logits: Tensor) -> None:
    """Refuse a model whose own prediction is not the decoded output of its last block."""
    slack = max(1e-3, 16 * torch.finfo(logits.dtype).eps)
    if not torch.allclose(model.decode(hidden), logits.float(), rtol=slack, atol=slack):
        raise ReplibError(
            f"The logit lens cannot read {model.name}: its logits are not final norm and unembedding of the "
            f"last block's output. Check load(..., architecture=...), found {model.architecture}."
        )


def _chunks(stream: Tensor, window: _Window) -> Iterator[tuple[Tensor, Tensor]]:
    """Readings and next tokens in chunks, since the logits of all layers would fill the memory."""
    layers, _, _ = stream.shape
    ids = window.next_ids.to(stream.device).repeat(layers)
    return zip(stream.flatten(0, 1).split(_LENS_CHUNK), ids.split(_LENS_CHUNK), strict=True)


def _measure(logits: Float[Tensor, "readings vocab"], next_ids: Int[Tensor, " readings"], top: int) -> _Part:
    if not 1 <= top <= logits.shape[-1]:
        raise ReplibError(f"top={top}: give a number from 1 to the vocabulary's {logits.shape[-1]} tokens.")
    probs = logits.softmax(-1)
    best = probs.topk(top)
    actual = logits.gather(-1, next_ids.clamp(min=0)[:, None])
    known = next_ids >= 0
    prob = probs.gather(-1, next_ids.clamp(min=0)[:, None])[:, 0].where(known, torch.nan)
    rank = (logits > actual).sum(-1).where(known, -1)
    parts = (torch.special.entr(probs).sum(-1), best.values, best.indices, prob, rank)
    return _Part(*(part.cpu() for part in parts))


def _measure_pair(
    model: ChatModel, base: Tensor, bent: Tensor, next_ids: Tensor, top: int
) -> tuple[_Part, _Part, Float[Tensor, " readings"]]:
    with model.adapter_off():  # an adapter may sit in the unembedding too
        base_logits = model.decode(base)
    bent_logits = model.decode(bent)
    js = js_discrete(base_logits, bent_logits).cpu()
    return _measure(base_logits, next_ids, top), _measure(bent_logits, next_ids, top), js


def _trajectory(model: ChatModel, window: _Window, parts: Sequence[_Part]) -> LensTrajectory:
    ids = window.ids
    whole = _Part(*map(torch.cat, zip(*parts, strict=True)))
    grid = [part.reshape(len(window.layers), len(ids), *part.shape[1:]) for part in whole]
    entropy, top_probs, top_ids, next_prob, next_rank = grid
    text = {i: model.tokenizer.decode([i]) for i in {*ids, *top_ids.flatten().tolist()}}
    words = tuple(tuple(tuple(text[i] for i in best) for best in row) for row in top_ids.tolist())
    return LensTrajectory(
        tokens=tuple(text[i] for i in ids),
        layers=tuple(window.layers),
        entropy=entropy,
        top_tokens=words,
        top_probs=top_probs,
        next_prob=next_prob,
        next_rank=next_rank,
        provenance=model.provenance() | versions(),
    )
