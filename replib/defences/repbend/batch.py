"""Micro-batches of RepBend: rows, token masks of the terms, and the states that a pass reads at them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from replib.data.prompts import Contrast, Dialogue
from replib.defences.repbend.config import PAIRED, BendConfig
from replib.models.chat_model import ChatModel
from replib.models.forward import forward_states
from replib.models.hooks import Hook
from replib.models.tokens import Batch

SAFE, UNSAFE_SIDE, RETAIN, TURNED, KEPT = range(5)
_TOGETHER = ("unsafe", "last", "refused", "paired_unsafe", "paired_safe")  # masks of terms that compare rows
Mask = Bool[Tensor, "rows tokens"]
_TermStates = Float[Tensor, "_layers _tokens dim"] | None


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
    """Padded batch of refusals, benign dialogues and unsafe answers, and the group of each row.

    TURNED rows are refusals of prompts that the base model complies with; only their answer tokens enter the safe term.
    KEPT rows are unpaired safe answers to harmless prompts; they enter the safe term and are never an anchor.
    ``ended`` adds an end-of-sequence token to each answer.
    """
    rows = (
        [(SAFE, c.prompt, c.safe_response) for c in contrasts]
        + [(TURNED, c.prompt, c.safe_response) for c in complied]
        + [(RETAIN, d.prompt, d.response) for d in retain]
        + [(UNSAFE_SIDE, c.prompt, c.unsafe_response) for c in complied or contrasts]
        + [(SAFE if d.label == "harmful" else KEPT, d.prompt, d.response) for d in safe]
        + [(UNSAFE_SIDE, d.prompt, d.response) for d in unsafe]
    )
    groups, prompts, responses = zip(*rows, strict=True)
    end = (chat.tokenizer.eos_token or "") if ended else ""
    batch = chat.encode(prompts, [r + end for r in responses])
    return batch, torch.tensor(groups, device=batch.input_ids.device)


def masks(batch: Batch, groups: Int[Tensor, " rows"], config: BendConfig) -> dict[str, Mask]:
    """Mask of the tokens of each field of a ``Reading``."""
    last = _last_prompt(batch)
    unsafe, refusals = _rows(groups, UNSAFE_SIDE), _rows(groups, _partners(groups))
    kept = _rows(groups, SAFE, TURNED, KEPT, *([RETAIN] if config.scope.retained else []))
    harmful = _rows(groups, UNSAFE_SIDE, *([SAFE] if config.scope.gathered == "harmful" and TURNED in groups else []))
    tokens = _tokens(batch, config.loss_mode, kept | unsafe)
    tokens |= last & ~_rows(groups, TURNED) & config.decision
    found = {"safe": tokens & kept, "unsafe": tokens & unsafe, "last": last & harmful}
    if config.anchored:
        found["refused"] = last & _rows(groups, SAFE)
    if config.eta:
        paired = _from(batch, batch.last_prompt, _shortest(batch, unsafe | refusals))
        found |= {"paired_unsafe": paired & unsafe, "paired_safe": paired & refusals}
    return found | {"final": _predicting(batch, groups, config)}


def _tokens(batch: Batch, mode: str, rows: Bool[Tensor, "rows 1"]) -> Mask:
    """Tokens of a loss mode; the shortest answer is taken among ``rows``."""
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
    """Mask of ``count`` tokens of each row from column ``start``."""
    columns = torch.arange(batch.input_ids.shape[1], device=start.device)
    return (columns >= start[:, None]) & (columns < start[:, None] + count)


def _shortest(batch: Batch, rows: Bool[Tensor, "rows 1"]) -> int:
    """Length of the shortest answer among ``rows``, within 1 and PAIRED."""
    return max(1, min(PAIRED, int(batch.response_mask.sum(dim=1)[rows[:, 0]].min())))


def _rows(groups: Int[Tensor, " rows"], *which: int) -> Bool[Tensor, "rows 1"]:
    return torch.isin(groups, torch.tensor(which, device=groups.device))[:, None]


def _partners(groups: Int[Tensor, " rows"]) -> int:
    """Group whose i-th row refuses the prompt of the i-th unsafe row."""
    return TURNED if TURNED in groups else SAFE


def _predicting(batch: Batch, groups: Int[Tensor, " rows"], config: BendConfig) -> Mask:
    """Tokens whose next-token distribution enters the KL."""
    kept = _rows(groups, RETAIN, *((SAFE, TURNED, KEPT) if config.scope.kl_rows == "safe" else ()))
    if config.scope.kl_tokens == "all":
        return batch.attention_mask.bool() & kept
    shifted = torch.zeros_like(batch.response_mask)
    shifted[:, :-1] = batch.response_mask[:, 1:]
    return shifted & kept & ~(_last_prompt(batch) & _rows(groups, TURNED))


@dataclass(frozen=True)
class Plan:
    """Rows of a micro-batch and the token mask of each term."""

    batch: Batch
    groups: Int[Tensor, " rows"]
    masks: dict[str, Mask]
    """Masks by field of ``Reading``."""

    @classmethod
    def of(cls, chat: ChatModel, items: Mapping[str, Sequence], config: BendConfig) -> Plan:
        """Plan of a micro-batch of contrasts and dialogues, see ``collate``."""
        batch, groups = collate(chat, **items, ended=config.scope.ended)
        return cls(batch, groups, masks(batch, groups, config))

    def rows(self, index: Int[Tensor, " chosen"]) -> Plan:
        """Plan of some rows, without the padding that only other rows need."""
        width = int(self.batch.attention_mask[index].sum(dim=1).max())
        start = self.batch.input_ids.shape[1] - width
        cut = {name: mask[index, start:] for name, mask in self.masks.items()}
        return Plan(self.batch.rows(index).columns(start, None), self.groups[index], cut)

    def count(self, name: str) -> int:
        """Number of tokens of a term."""
        return int(self.masks[name].sum())

    def parts(self, tokens: int) -> Iterator[Plan]:
        """Parts of the plan: first all rows of the terms that compare rows, in order, then the others.

        The others are sorted by length; a part has at most ``tokens`` tokens, padding included, or a single row.
        """
        together = torch.stack([m.any(dim=1) for name, m in self.masks.items() if name in _TOGETHER]).any(dim=0)
        yield self.rows(together.nonzero()[:, 0])
        lengths = self.batch.attention_mask.sum(dim=1)
        rest = sorted((~together).nonzero()[:, 0].tolist(), key=lambda i: -int(lengths[i]))
        while rest:
            size = max(1, tokens // int(lengths[rest[0]]))
            yield self.rows(torch.tensor(rest[:size], device=lengths.device))
            rest = rest[size:]


@dataclass(frozen=True)
class Reading:
    """States of one pass for the terms; None for a field without tokens in these rows."""

    safe: _TermStates = None
    """[blocks, tokens, dim] of refusals and benign answers; [target blocks, ...] with ``alpha_mode`` "target"."""
    unsafe: _TermStates = None
    """[target blocks, tokens, dim] of unsafe answers."""
    last: _TermStates = None
    """[target blocks, rows, dim] of the last tokens of the prompts in A_u."""
    refused: _TermStates = None
    """[target blocks, rows, dim] of the last tokens of refused prompts; with ``anchored`` alone."""
    paired_unsafe: _TermStates = None
    """[target blocks, tokens, dim] of unsafe answers, from the last prompt token on; with eta alone."""
    paired_safe: _TermStates = None
    """[target blocks, tokens, dim] of the refusals of the same prompts, token by token."""
    final: Tensor | None = None
    """[tokens, dim] after the final norm, of the tokens whose next-token distribution enters the KL."""


def read(chat: ChatModel, plan: Plan, layers: Sequence[int], config: BendConfig) -> Reading:
    """Run one forward pass up to the highest block of the terms, and keep only their states."""
    wanted = {name: mask for name, mask in plan.masks.items() if mask.any()}
    normed = config.scope.hidden_states and config.site == "resid_post"  # the last layer follows the final norm
    depth = {name: _depth(name, chat.n_layers, layers, config) for name in wanted if name != "final"}
    seen: dict[int, Tensor] = {}
    read_at = sorted({i for kept in depth.values() for i in kept} - ({chat.n_layers - 1} if normed else set()))
    hooks = {(config.site, i): _keep(seen, i) for i in read_at}
    through = "final" in wanted or (normed and any(chat.n_layers - 1 in kept for kept in depth.values()))
    final = forward_states(chat, plan.batch, hooks, last=None if through else read_at[-1])
    if normed and final is not None:
        seen[chat.n_layers - 1] = final
    states = {name: torch.stack([seen[i][wanted[name]] for i in kept]) for name, kept in depth.items()}
    return Reading(**states, final=None if final is None or "final" not in wanted else final[wanted["final"]])


def _depth(name: str, depth: int, layers: Sequence[int], config: BendConfig) -> Sequence[int]:
    """Layers of a term."""
    return range(depth) if name == "safe" and config.alpha_mode == "all" else layers


def _keep(seen: dict[int, Tensor], layer: int) -> Hook:
    """Hook that keeps whole states; a checkpointed block runs its hooks again, so they compute nothing."""

    def hook(hidden: Tensor) -> None:
        seen[layer] = hidden

    return hook
