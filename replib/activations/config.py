"""Options of a capture, documented once and checked before a model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

import torch

from replib.core.errors import ReplibError
from replib.models.hooks import check_site
from replib.models.tokens import SPANS, Position, check_positions


@dataclass(frozen=True)
class CaptureConfig:
    """Sites, blocks and tokens that a capture reads, and how it reads them.

    Raises:
        ReplibError: an unknown site, position, pooling or choice, or a batch size below 1.
    """

    site: str | Sequence[str] = "resid_post"
    """One of ``SITES``, see ``replib.models.hooks``; several if the result goes to a folder."""
    layers: Sequence[int] | None = None
    """Block indices, default all; negative ones count from the last."""
    positions: Position | Sequence[Position] = "last_prompt"
    """``last_prompt``; a span (``instruction``, ``post_instruction``, ``prompt``, ``response``, ``all``); an integer
    offset from the first response token (-1 is the last prompt token, 0 the first response token); or several."""
    pool: str = "mean"
    """``mean``: float32 mean over the tokens of a span; ``none``: every token of one span."""
    max_new_tokens: int = 0
    """Length of a greedy answer, generated first and used as the response: position k is decode step k."""
    system: str | None = None
    """System prompt before each prompt."""
    overflow: str = "refuse"
    """Treatment of a prompt longer than the context: ``refuse`` or ``truncate``."""
    short: str = "refuse"
    """Treatment of a prompt that lacks a wanted token (its answer ends early): ``refuse`` or ``leave_out``."""
    batch_size: int = 64
    """Largest number of prompts in one forward pass; halved when memory runs out."""
    dtype: torch.dtype = torch.float32
    """Dtype of the result; pooling is in float32."""

    def __post_init__(self) -> None:
        for site in self.sites:
            check_site(site)
        check_positions(self.picks)
        if self.pool not in ("mean", "none"):
            raise ReplibError(
                f"Unknown pooling {self.pool!r}: use 'mean' (one vector per prompt) or 'none' (one per token)."
            )
        if self.pool == "none" and (not self.single or self.picks[0] not in SPANS):
            raise ReplibError(f"pool='none' takes one span ({', '.join(SPANS)}), not positions={self.positions!r}.")
        if self.short not in ("refuse", "leave_out"):
            raise ReplibError(f"short={self.short!r}: say 'refuse' or 'leave_out'.")
        if self.batch_size < 1:
            raise ReplibError(f"batch_size={self.batch_size}: give 1 or more prompts per batch.")

    @classmethod
    def of(cls, config: CaptureConfig | None, changes: dict[str, Any]) -> CaptureConfig:
        """The given configuration, or the default one, with single fields changed.

        Raises:
            ReplibError: a change of an unknown field; the message lists the nearest names.
        """
        names = [field.name for field in fields(cls)]
        for wrong in changes.keys() - set(names):
            near = get_close_matches(wrong, names, n=2) or names
            raise ReplibError(f"A capture has no option {wrong!r}: use {' or '.join(near)}.")
        return replace(config or cls(), **changes)

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites, one or several."""
        return (self.site,) if isinstance(self.site, str) else tuple(self.site)

    @property
    def picks(self) -> tuple[Position, ...]:
        """Positions, one or several."""
        return (self.positions,) if isinstance(self.positions, str | int) else tuple(self.positions)

    @property
    def single(self) -> bool:
        """Whether one position is read, so that results have no axis for positions."""
        return isinstance(self.positions, str | int)
