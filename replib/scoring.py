"""Prompts put to a model under several edits at once, each on its own copy of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from replib.chat import ChatModel
from replib.edits import applied
from replib.methods import SiteEdits
from replib.prefix import Prefix
from replib.refusals import first_logits


@dataclass(frozen=True)
class Found:
    """What a model does under each of several edits; None where that was not asked for."""

    scored: Float[Tensor, "edits scored vocab"] | None
    """First-token logits of the scored prompts, on the CPU."""
    neutral: Float[Tensor, "edits neutral vocab"] | None
    """The same of the neutral prompts."""
    answers: list[list[str]] | None
    """To the scored prompts, edit by edit."""


class Scorer:
    """Asks the same prompts under one edit after the other, as many edits a pass as ``batch_size`` rows hold.

    What an edit of the last prompt token leaves alone, the tokens before it, is read once (``prefix``).
    """

    def __init__(
        self, model: ChatModel, scored: Sequence[str], neutral: Sequence[str], *, length: int, batch_size: int
    ):
        self.model, self.scored, self.neutral = model, list(scored), list(neutral)
        self.length, self.batch_size = length, batch_size

    @property
    def room(self) -> int:
        """Edits that share a pass."""
        return max(1, self.batch_size // max(len(self.scored), len(self.neutral)))

    def run(self, edits: Sequence[SiteEdits], positions: str, *, first: bool = True, answers: bool = True) -> Found:
        """First-token logits of both lists, and answers to the scored one, under each edit."""
        prefixes = self.prefixes if positions == "last_prompt" else None  # read before anything is edited
        scored, neutral = prefixes or (None, None)
        with applied(self.model, edits, positions=positions):
            return Found(
                self._first(self.scored, len(edits), scored) if first else None,
                self._first(self.neutral, len(edits), neutral) if first else None,
                self._answers(len(edits), scored) if answers else None,
            )

    def read(self, positions: str, *, first: bool, answers: bool) -> int:
        """Tokens of prompts that one edit makes the model read: the last of each where the others are read once."""
        texts = [*self.scored, *self.neutral]
        if positions == "last_prompt" and self._fits:
            return (first * len(texts)) + (answers * len(self.scored))
        lengths = list(map(len, self.model.tokenize(texts)))
        return first * sum(lengths) + answers * sum(lengths[: len(self.scored)])

    @property
    def _fits(self) -> bool:
        return max(len(self.scored), len(self.neutral)) <= self.batch_size

    @cached_property
    def prefixes(self) -> tuple[Prefix, Prefix] | None:
        """Scored and neutral prompts, read once; None where they do not fit a batch or cannot be read in parts."""
        if not self._fits:
            return None
        found = Prefix.read(self.model, self.scored), Prefix.read(self.model, self.neutral)
        return found if all(prefix.whole for prefix in found) else None

    def _first(self, texts: list[str], groups: int, prefix: Prefix | None) -> Float[Tensor, "edits prompts vocab"]:
        if prefix:
            logits = prefix.first_logits(groups).float().cpu()
        else:  # several edits fit one batch, or a single one takes several
            logits = first_logits(self.model, texts * groups, batch_size=self.batch_size)
        return logits.unflatten(0, (groups, -1))

    def _answers(self, groups: int, prefix: Prefix | None) -> list[list[str]]:
        if prefix:
            answers = prefix.answers(groups, max_new_tokens=self.length)
        elif groups == 1:
            answers = self.model.generate(self.scored, max_new_tokens=self.length, batch_size=self.batch_size)
        else:
            answers = self.model.complete(self.model.encode(self.scored * groups), self.length)
        n = len(self.scored)
        return [answers[i : i + n] for i in range(0, len(answers), n)]
