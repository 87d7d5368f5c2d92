"""Which tokens of a prompt are read: named spans, integers from where the response begins, means or single tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from replib.core.errors import ReplibError
from replib.tokens import Batch

SPANS = ("last_prompt", "instruction", "post_instruction", "prompt", "response", "all")
Position = str | int


def check_positions(positions: Sequence[Position]) -> list[Position]:
    """Positions as they are, or an error that lists the known ones."""
    for p in positions:
        if (isinstance(p, str) and p not in SPANS) or isinstance(p, bool):
            raise ReplibError(f"Unknown position {p!r}: use {', '.join(SPANS)}, or an integer.")
    if not positions:
        raise ReplibError(f"No position was given: use {', '.join(SPANS)}, or an integer.")
    return list(positions)


@dataclass(frozen=True)
class Chosen:
    """The wanted vectors of a batch: what takes them from hidden states, and the row of each."""

    take: Callable[[Tensor], Tensor]
    """``[rows, tokens, dim]`` to float32 ``[vectors, positions, dim]``."""
    rows: Int[Tensor, " vectors"]
    mask: Bool[Tensor, "rows tokens"] | None = None
    """The tokens, where each is wanted by itself."""


def choose(batch: Batch, positions: Sequence[Position], pool: str = "mean") -> Chosen:
    """Where the wanted positions of a batch are, checked once, before it is read."""
    if pool == "none":
        mask = _filled(batch, str(positions[0]))
        return Chosen(lambda hidden: hidden[mask.to(hidden.device)].float()[:, None], mask.nonzero()[:, 0], mask)
    takers = [_taker(batch, p) for p in positions]
    return Chosen(
        lambda hidden: torch.stack([take(hidden) for take in takers], dim=1), torch.arange(len(batch.input_ids))
    )


def complete(batch: Batch, positions: Sequence[Position]) -> Int[Tensor, " rows"]:
    """Rows of a batch that have every wanted position."""
    there = [
        _located(batch, p)[1] if isinstance(p, int) else span(batch, p).any(dim=1)
        for p in positions
        if p != "last_prompt"
    ]
    return torch.stack([torch.ones_like(batch.last_prompt, dtype=torch.bool), *there]).all(dim=0).nonzero()[:, 0]


def _taker(batch: Batch, position: Position) -> Callable[[Tensor], Tensor]:
    """The token at an integer position, or the float32 mean over a span: ``[rows, tokens, dim]`` to ``[rows, dim]``."""
    if position == "last_prompt":
        position = -1
    if isinstance(position, int):
        rows, column = torch.arange(len(batch.input_ids), device=batch.input_ids.device), _column(batch, position)
        return lambda hidden: hidden[rows.to(hidden.device), column.to(hidden.device)].float()
    mask = _filled(batch, position).float()
    weights = mask / mask.sum(1, keepdim=True)
    return lambda hidden: torch.einsum("rt,rtd->rd", weights.to(hidden.device), hidden.float())


def _column(batch: Batch, position: int) -> Int[Tensor, " rows"]:
    """Column of a position that every row must have."""
    column, inside = _located(batch, position)
    if inside.all():
        return column
    short, n = int((~inside).sum()), len(inside)
    if position < 0:
        raise ReplibError(f"Position {position} lies before the start of a prompt: {short} of {n} prompts are shorter.")
    raise ReplibError(
        f"Position {position} lies beyond the response of {short} of {n} prompts: give longer responses (or let the "
        "model write them with max_new_tokens=…), or read an earlier position."
    )


def _located(batch: Batch, position: int) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """Column of a position counted from where each row's response begins, and whether the row has it."""
    column = batch.last_prompt + 1 + position
    mask = batch.prompt_mask if position < 0 else batch.response_mask
    inside = (column >= 0) & (column < mask.shape[1])
    return column, inside & mask.gather(1, column.clamp(0, mask.shape[1] - 1)[:, None])[:, 0]


def _filled(batch: Batch, name: str) -> Tensor:
    mask = span(batch, name)
    if not mask.any(dim=1).all():
        raise ReplibError(
            f"The span {name!r} of a row is empty: give responses (or max_new_tokens=…), or read another position."
        )
    return mask


def span(batch: Batch, name: str) -> Tensor:
    """The token mask of a named span."""
    return {
        "instruction": batch.instruction_mask,
        "post_instruction": batch.post_mask,
        "prompt": batch.prompt_mask,
        "response": batch.response_mask,
        "all": batch.attention_mask.bool(),
    }[name]
