"""What one pass over a batch leaves for RepBend's terms: which tokens of which rows each of them is taken on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from replib.bend import (
    PAIRED,
    BendConfig,
    BendTerms,
    anchored_cosine,
    distance,
    kl_divergence,
    mean_cosine,
)
from replib.chat import Batch, ChatModel
from replib.prompts import Contrast, Dialogue
from replib.sites import Hook, hooked

SAFE, UNSAFE, RETAIN, TURNED, KEPT = range(5)
Mask = Bool[Tensor, "rows tokens"]


def collate(
    chat: ChatModel,
    contrasts: Sequence[Contrast],
    retain: Sequence[Dialogue],
    complied: Sequence[Contrast] = (),
    safe: Sequence[Dialogue] = (),
    unsafe: Sequence[Dialogue] = (),
    *,
    ended: bool = True,
) -> tuple[Batch, Tensor]:
    """One padded batch of refusals, benign dialogues and unsafe answers, and the group of each row.

    TURNED rows are refusals of prompts that the model complies with: their answers are kept, their decision is not.
    KEPT rows are unpaired safe answers to prompts that are not harmful: kept as refusals are, and never gathered on.
    ``ended``: each answer with an end-of-sequence token.
    """
    rows = (
        [(SAFE, c.prompt, c.safe_response) for c in contrasts]
        + [(TURNED, c.prompt, c.safe_response) for c in complied]
        + [(RETAIN, d.prompt, d.response) for d in retain]
        + [(UNSAFE, c.prompt, c.unsafe_response) for c in complied or contrasts]
        + [(SAFE if d.label == "harmful" else KEPT, d.prompt, d.response) for d in safe]
        + [(UNSAFE, d.prompt, d.response) for d in unsafe]
    )
    groups, prompts, responses = zip(*rows, strict=True)
    end = (chat.tokenizer.eos_token or "") if ended else ""
    batch = chat.encode(prompts, [r + end for r in responses])
    return batch, torch.tensor(groups, device=batch.input_ids.device)


# --------------------------------------------------------------------------------------------- which tokens
def masks(batch: Batch, groups: Int[Tensor, " rows"], config: BendConfig) -> dict[str, Mask]:
    """For each field of a ``Reading`` that holds states, the tokens that it is read on."""
    last = _last_prompt(batch)
    unsafe, refusals = _rows(groups, UNSAFE), _rows(groups, _partners(groups))
    kept = _rows(groups, SAFE, TURNED, KEPT, *([RETAIN] if config.scope.retained else []))
    harmful = _rows(groups, UNSAFE, *([SAFE] if config.scope.gathered == "harmful" and TURNED in groups else []))
    tokens = _tokens(batch, config.loss_mode, kept | unsafe)
    tokens |= last & ~_rows(groups, TURNED) & config.decision
    found = {"safe": tokens & kept, "unsafe": tokens & unsafe, "last": last & harmful}
    found["refused"] = last & _rows(groups, SAFE)
    if config.eta:
        paired = _from(batch, batch.last_prompt, _shortest(batch, unsafe | refusals))
        found |= {"paired_unsafe": paired & unsafe, "paired_safe": paired & refusals}
    return found


def _tokens(batch: Batch, mode: str, rows: Bool[Tensor, "rows 1"]) -> Mask:
    """The tokens of a loss mode; ``rows`` are those among which the shortest answer is looked for."""
    read = batch.attention_mask.bool()
    if mode == "request_last":
        return _last_prompt(batch)
    if mode in ("request_all", "request_response"):
        return read & ~batch.response_mask if mode == "request_all" else read
    if mode == "response_all":
        return batch.response_mask.clone()
    count = 1 if mode == "response_one" else _shortest(batch, rows)
    return batch.response_mask & _from(batch, batch.last_prompt + 1, count)


def _last_prompt(batch: Batch) -> Mask:
    return _from(batch, batch.last_prompt, 1)


def _from(batch: Batch, start: Int[Tensor, " rows"], count: int) -> Mask:
    """So many tokens of each row from a column on."""
    columns = torch.arange(batch.input_ids.shape[1], device=start.device)
    return (columns >= start[:, None]) & (columns < start[:, None] + count)


def _shortest(batch: Batch, rows: Bool[Tensor, "rows 1"]) -> int:
    """Tokens of the shortest answer among some rows, at least 1 and PAIRED at most."""
    return max(1, min(PAIRED, int(batch.response_mask.sum(dim=1)[rows[:, 0]].min())))


def _rows(groups: Int[Tensor, " rows"], *which: int) -> Bool[Tensor, "rows 1"]:
    return torch.isin(groups, torch.tensor(which, device=groups.device))[:, None]


def _partners(groups: Int[Tensor, " rows"]) -> int:
    """The group whose i-th row is the refusal of the i-th unsafe row's prompt."""
    return TURNED if TURNED in groups else SAFE


def _predicting(batch: Batch, groups: Int[Tensor, " rows"], config: BendConfig) -> Mask:
    """Tokens whose next token the KL is taken on."""
    kept = _rows(groups, RETAIN, *((SAFE, TURNED, KEPT) if config.scope.kl_rows == "safe" else ()))
    if config.scope.kl_tokens == "all":
        return batch.attention_mask.bool() & kept
    shifted = torch.zeros_like(batch.response_mask)
    shifted[:, :-1] = batch.response_mask[:, 1:]
    return shifted & kept & ~(_last_prompt(batch) & _rows(groups, TURNED))


# --------------------------------------------------------------------------------------------- one pass
@dataclass(frozen=True)
class Reading:
    """What one pass leaves for the terms."""

    safe: Tensor
    """[blocks, tokens, dim] of refusals and benign answers; [target blocks, ...] with ``alpha_mode`` "target"."""
    unsafe: Tensor
    """[target blocks, tokens, dim] of unsafe answers."""
    last: Tensor
    """[target blocks, rows, dim] of the last tokens of the prompts in A_u."""
    refused: Tensor
    """[target blocks, rows, dim] of the last tokens of refused prompts."""
    logits: Tensor
    """[tokens, vocab] of the next tokens that the KL covers."""
    sequences: int
    """Rows that the KL covers."""
    paired_unsafe: Tensor | None = None
    """[target blocks, tokens, dim] of unsafe answers, from the last prompt token on; None without eta."""
    paired_safe: Tensor | None = None
    """The same of the refusals of the same prompts, token by token."""


def read(
    chat: ChatModel,
    wrapped: nn.Module,
    batch: Batch,
    groups: Tensor,
    layers: Sequence[int],
    config: BendConfig | None = None,
) -> Reading:
    """One forward pass, keeping only what the loss needs; logits are made only where the KL is taken."""
    config = config or BendConfig()
    wanted, end = masks(batch, groups, config), chat.n_layers - 1
    kept: dict[str, list[Tensor]] = {name: [] for name in wanted}

    def keep(layer: int) -> Hook:
        names = [n for n in wanted if layer in layers or (n == "safe" and config.alpha_mode == "all")]

        def hook(hidden: Tensor) -> None:
            for name in names:
                kept[name].append(hidden[wanted[name]])

        return hook

    normed = config.scope.hidden_states and config.site == "resid_post"  # the last layer behind the final norm
    hooks = {(config.site, i): keep(i) for i in range(chat.n_layers - normed)}
    final = _forward(chat, wrapped, batch, hooks)
    if normed:
        keep(end)(final)
    predicting = _predicting(batch, groups, config)
    states = {name: torch.stack(x) for name, x in kept.items()}
    return Reading(logits=chat.logits(final[predicting]), sequences=int(predicting.any(dim=1).sum()), **states)


def _forward(chat: ChatModel, wrapped: nn.Module, batch: Batch, hooks: dict[tuple[str, int], Hook]) -> Tensor:
    """Run the model under hooks; what comes out of the final norm, [rows, tokens, dim]."""
    final: list[Tensor] = []
    handle = chat.final_norm.register_forward_hook(lambda _m, _a, out: final.append(out))
    try:
        with hooked(chat, hooks), chat.reading_batch(batch):
            wrapped(**batch.inputs(), use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return final[-1]  # where sites are looked for, a prompt passes before


# --------------------------------------------------------------------------------------------- two passes
def bend_terms(bent: Reading, base: Reading, config: BendConfig, queue: Tensor | None = None) -> BendTerms:
    """The terms of one batch from a pass with the adapter and a pass without.

    ``queue``: [target blocks, rows, dim] of earlier steps, see ``Scope.queue``.
    """
    hinge = {"max_distance": config.max_distance, "directional": config.directional}
    last = bent.last if queue is None else torch.cat([queue, bent.last], dim=1)
    centre = torch.cat([base.last, base.refused], dim=1).mean(dim=1, keepdim=True)
    return BendTerms(
        safe=distance(bent.safe, base.safe, relative=config.relative) * _share(config, len(bent.safe)),
        unsafe=distance(bent.unsafe, base.unsafe, relative=config.relative, **hinge),  # type: ignore[arg-type]
        cosine=anchored_cosine(last, base.refused, centre) if config.anchored else mean_cosine(last),
        kl=kl_divergence(base.logits, bent.logits, config.temperature, _sequences(bent, config)),
        pairing=_pairing(bent.paired_unsafe, base.paired_safe, config),
    )


def _share(config: BendConfig, depth: int) -> float:
    """Layers that move among those in the mean of the safe term: hidden states count the embeddings."""
    counted = config.scope.hidden_states and config.site == "resid_post" and config.alpha_mode == "all"
    return depth / (depth + 1) if counted else 1.0


def _sequences(reading: Reading, config: BendConfig) -> int | None:
    return reading.sequences if config.scope.kl_reduction == "sequence" else None


def _pairing(unsafe: Tensor | None, refusals: Tensor | None, config: BendConfig) -> Tensor | None:
    if unsafe is None or refusals is None:
        return None
    return distance(unsafe, refusals, relative=config.relative)
