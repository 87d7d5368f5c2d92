"""Token ids of prompts: rows with instruction and response borders, padded batches with a mask per role."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from replib.core.errors import ReplibError


@dataclass(frozen=True)
class Row:
    """Token ids of one prompt and its response, if any."""

    ids: list[int]
    instruction: tuple[int, int]
    """Start and stop of the tokens that hold any character of the instruction."""
    prompt: int
    """Number of tokens of template and instruction, before the response."""

    def __len__(self) -> int:
        return len(self.ids)

    def answered(self, response: Sequence[int]) -> Row:
        """Row with ``response`` appended."""
        return replace(self, ids=self.ids + list(response))

    def following(self, count: int) -> Row:
        """Row without its first ``count`` tokens, all of its prompt."""
        start, stop = (max(0, end - count) for end in self.instruction)
        return Row(self.ids[count:], (start, stop), self.prompt - count)

    def shortened(self, count: int) -> Row:
        """Row without the last ``count`` tokens of its instruction."""
        start, stop = self.instruction
        return Row(self.ids[: stop - count] + self.ids[stop:], (start, stop - count), self.prompt - count)


@dataclass
class Batch:
    """Left-padded token ids with a mask per role, all ``[rows, tokens]``."""

    input_ids: Int[Tensor, "rows tokens"]
    attention_mask: Int[Tensor, "rows tokens"]
    """1 on tokens to read, 0 on padding and after the end of a written answer."""
    position_ids: Int[Tensor, "rows tokens"]
    prompt_mask: Bool[Tensor, "rows tokens"]
    """Template and instruction, before the response."""
    instruction_mask: Bool[Tensor, "rows tokens"]
    """Tokens of the instruction (part of the prompt)."""
    post_mask: Bool[Tensor, "rows tokens"]
    """Template tokens after the instruction (part of the prompt)."""
    response_mask: Bool[Tensor, "rows tokens"]

    @property
    def last_prompt(self) -> Int[Tensor, " rows"]:
        """Column of each row's last prompt token."""
        columns = torch.arange(self.prompt_mask.shape[1], device=self.prompt_mask.device)
        return (self.prompt_mask * columns).amax(dim=1)

    def to(self, device: torch.device) -> Batch:
        """Batch on another device."""
        return self._map(lambda _, x: x.to(device))

    def rows(self, index: Int[Tensor, " chosen"]) -> Batch:
        """Rows by index, repeats allowed."""
        return self._map(lambda _, x: x[index])

    def columns(self, start: int, stop: int | None) -> Batch:
        """Columns from ``start`` to ``stop``."""
        return self._map(lambda _, x: x[:, start:stop])

    def answered(self, tokens: Int[Tensor, "rows more"], read: Bool[Tensor, "rows more"] | None = None) -> Batch:
        """Rows with more answer tokens; ``read`` is False after the end of an answer."""
        read = torch.ones_like(tokens, dtype=torch.bool) if read is None else read
        steps = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        new = {
            "input_ids": tokens,
            "position_ids": self.position_ids[:, -1:] + steps,
            "attention_mask": read.long(),
            "response_mask": read,
        }
        nothing = torch.zeros_like(read)
        return self._map(lambda name, x: torch.cat([x, new.get(name, nothing)], dim=1))

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> Batch:
        return Batch(**{f.name: change(f.name, getattr(self, f.name)) for f in fields(self)})

    def inputs(self) -> dict[str, Tensor]:
        """Arguments of the model's forward pass."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }


def padded(rows: Sequence[Row], pad: int) -> Batch:
    """Batch of rows, padded on the left to the longest."""
    width = max(map(len, rows))
    left = torch.tensor([[width - len(r)] for r in rows])
    start, stop = (left + torch.tensor([[r.instruction[end]] for r in rows]) for end in (0, 1))
    prompt = left + torch.tensor([[r.prompt] for r in rows])
    column = torch.arange(width)[None]
    return Batch(
        input_ids=torch.tensor([[pad] * (width - len(r)) + r.ids for r in rows]),
        attention_mask=(column >= left).long(),
        position_ids=(column - left).clamp(min=0),
        prompt_mask=(column >= left) & (column < prompt),
        instruction_mask=(column >= start) & (column < stop),
        post_mask=(column >= stop) & (column < prompt),
        response_mask=column >= prompt,
    )


def fitted(rows: Sequence[Row], context: int, overflow: str, name: str) -> list[Row]:
    """Rows no longer than the context.

    Args:
        rows: tokenised prompts.
        context: maximum number of tokens per row.
        overflow: "refuse", or "truncate" the end of the instruction; template and response are unchanged.
        name: model name for the message.

    Raises:
        ReplibError: a row exceeds the context and may not or cannot be shortened.
    """
    if overflow not in ("refuse", "truncate"):
        raise ReplibError(f"overflow={overflow!r}: say 'refuse' or 'truncate'.")
    excess = [max(0, len(row) - context) for row in rows]
    if not any(excess):
        return list(rows)
    # Truncation leaves at least one token of the instruction.
    stuck = [i for i, (r, n) in enumerate(zip(rows, excess, strict=True)) if n >= r.instruction[1] - r.instruction[0]]
    if overflow == "refuse" or stuck:
        worst = stuck[0] if overflow == "truncate" else max(range(len(rows)), key=excess.__getitem__)
        raise ReplibError(
            f"Prompt {worst} has {len(rows[worst])} tokens, but {name} reads at most {context}. "
            + ("Shorten or drop it" + ("." if overflow == "truncate" else ", or pass overflow='truncate'."))
        )
    cut = [n for n in excess if n]
    warnings.warn(
        f"{len(cut)} of {len(rows)} prompts are longer than the {context} tokens {name} reads: their instructions "
        f"lost {sum(cut)} tokens at the end, {max(cut)} at most.",
        stacklevel=3,
    )
    return [row.shortened(n) if n else row for row, n in zip(rows, excess, strict=True)]


@dataclass(frozen=True)
class Span:
    """Named part of every row."""

    of_row: Callable[[Row], range]
    """Token indices of the span in a row."""
    mask: Callable[[Batch], Bool[Tensor, "rows tokens"]]
    """Mask of the span in a batch."""


SPANS = {
    "instruction": Span(lambda row: range(*row.instruction), lambda batch: batch.instruction_mask),
    "post_instruction": Span(lambda row: range(row.instruction[1], row.prompt), lambda batch: batch.post_mask),
    "prompt": Span(lambda row: range(row.prompt), lambda batch: batch.prompt_mask),
    "response": Span(lambda row: range(row.prompt, len(row)), lambda batch: batch.response_mask),
    "all": Span(lambda row: range(len(row)), lambda batch: batch.attention_mask.bool()),
}
Position = str | int


def check_positions(positions: Sequence[Position]) -> list[Position]:
    """Positions as a list; raises ReplibError for an unknown one."""
    known = ("last_prompt", *SPANS)
    for p in positions:
        if (isinstance(p, str) and p not in known) or isinstance(p, bool):
            raise ReplibError(f"Unknown position {p!r}: use {', '.join(known)}, or an integer.")
    if not positions:
        raise ReplibError(f"No position was given: use {', '.join(known)}, or an integer.")
    return list(positions)


@dataclass(frozen=True)
class TokenSelection:
    """Selection of vectors from the hidden states of a batch."""

    take: Callable[[Tensor], Tensor]
    """``[rows, tokens, dim]`` to float32 ``[vectors, positions, dim]``."""
    rows: Int[Tensor, " vectors"]
    """Row index of each vector."""
    mask: Bool[Tensor, "rows tokens"] | None = None
    """Selected tokens, without pooling."""


def choose(batch: Batch, positions: Sequence[Position], pool: str = "mean") -> TokenSelection:
    """Selection of the wanted positions of a batch; raises ReplibError if a row lacks one."""
    if pool == "none":
        mask = _filled(batch, str(positions[0]))
        return TokenSelection(
            lambda hidden: hidden[mask.to(hidden.device)].float()[:, None], mask.nonzero()[:, 0], mask
        )
    takers = [_taker(batch, p) for p in positions]
    return TokenSelection(
        lambda hidden: torch.stack([take(hidden) for take in takers], dim=1), torch.arange(len(batch.input_ids))
    )


def complete(batch: Batch, positions: Sequence[Position]) -> Int[Tensor, " rows"]:
    """Rows of a batch that have every wanted position."""
    there = [
        _located(batch, p)[1] if isinstance(p, int) else SPANS[p].mask(batch).any(dim=1)
        for p in positions
        if p != "last_prompt"
    ]
    return torch.stack([torch.ones_like(batch.last_prompt, dtype=torch.bool), *there]).all(dim=0).nonzero()[:, 0]


def _taker(batch: Batch, position: Position) -> Callable[[Tensor], Tensor]:
    """Map of ``[rows, tokens, dim]`` to ``[rows, dim]``: token at an integer position, or float32 mean over a span."""
    if position == "last_prompt":
        position = -1
    if isinstance(position, int):
        rows, column = torch.arange(len(batch.input_ids), device=batch.input_ids.device), _column(batch, position)
        return lambda hidden: hidden[rows.to(hidden.device), column.to(hidden.device)].float()
    mask = _filled(batch, position).float()
    weights = mask / mask.sum(1, keepdim=True)
    return lambda hidden: torch.einsum("rt,rtd->rd", weights.to(hidden.device), hidden.float())


def _column(batch: Batch, position: int) -> Int[Tensor, " rows"]:
    """Column of an integer position in each row; raises ReplibError if a row lacks it."""
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
    """Column of an offset from each row's first response token, and whether the row has it."""
    column = batch.last_prompt + 1 + position
    mask = batch.prompt_mask if position < 0 else batch.response_mask
    inside = (column >= 0) & (column < mask.shape[1])
    return column, inside & mask.gather(1, column.clamp(0, mask.shape[1] - 1)[:, None])[:, 0]


def _filled(batch: Batch, name: str) -> Bool[Tensor, "rows tokens"]:
    """Mask of a span; raises ReplibError if it is empty in a row."""
    mask = SPANS[name].mask(batch)
    if not mask.any(dim=1).all():
        raise ReplibError(
            f"The span {name!r} of a row is empty: give responses (or max_new_tokens=…), or read another position."
        )
    return mask
