"""Prompts put to a model under several edits at once, each on its own copy of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Cache

from replib.audit.judges import Judge, encode_outcomes
from replib.data.prompts import Prompt
from replib.edits.apply import Edited, applied_each
from replib.models.chat_model import ChatModel
from replib.models.prefix_cache import CachedPrompts
from replib.models.tokens import Batch

_LATE = frozenset({"last_prompt", "response", "decode"})
"""Positions that leave the tokens before the last prompt token as they are."""


class EditedGeneration:
    """Asks the same prompts under one edit after the other, as many edits a pass as ``batch_size`` rows hold.

    What no edit of a pass changes, the tokens before the last of a prompt, is read once for all passes.
    """

    def __init__(
        self, model: ChatModel, prompts: Sequence[str], *, openings: Sequence[str] = (), length: int, batch_size: int
    ):
        self.model, self.prompts, self.openings = model, list(prompts), list(openings) or [""] * len(prompts)
        self.length, self.batch_size = length, batch_size

    @property
    def room(self) -> int:
        """Edits that share a pass."""
        return max(1, self.batch_size // len(self.prompts))

    def run(
        self, edits: Sequence[Edited], *, length: int | None = None
    ) -> tuple[Float[Tensor, "edits prompts vocab"], list[list[str]]]:
        """First-token logits, on the CPU, and answers of ``length`` tokens at most, under each edit.

        An answer begins with its opening; logits are those of the token behind it.
        """
        prefix = self._prefix if self._apart(edits) else None  # read before anything is edited
        with applied_each(self.model, edits):
            read = (prefix.copies(len(edits)),) if prefix else self._batches(len(edits))
            parts = [self.model.replied(batch, length or self.length, past=past) for batch, past in read]
        logits = torch.cat([part.cpu() for part, _ in parts]).unflatten(0, (len(edits), -1))
        answers = [text for _, texts in parts for text in texts]
        n, begun = len(self.prompts), self.openings * len(edits)
        answers = [opening + text for opening, text in zip(begun, answers, strict=True)]
        return logits, [answers[i : i + n] for i in range(0, len(answers), n)]

    def read(self, positions: str) -> int:
        """Tokens of prompts that an edit at such positions makes the model read."""
        apart = self._apart([{positions: {}}]) and self._fits
        return len(self.prompts) if apart else sum(map(len, self.model.tokenize(self.prompts, self.openings)))

    def _batches(self, copies: int) -> Iterator[tuple[Batch, Cache | None]]:
        """Several edits fit one batch, or a single one takes several."""
        texts, openings = self.prompts * copies, self.openings * copies
        for i in range(0, len(texts), self.batch_size):
            part = slice(i, i + self.batch_size)
            yield self.model.encode(texts[part], openings[part]), None

    def _apart(self, edits: Sequence[Edited]) -> bool:
        """Whether no edit changes what comes before the last token, which is of the prompt."""
        return _LATE.issuperset(positions for edit in edits for positions in edit) and not any(self.openings)

    @property
    def _fits(self) -> bool:
        return len(self.prompts) <= self.batch_size

    @cached_property
    def _prefix(self) -> CachedPrompts | None:
        """The prompts, read once; None where they do not fit a batch or cannot be read in parts."""
        prefix = CachedPrompts.read(self.model, self.prompts) if self._fits else None
        return prefix if prefix and prefix.complete else None


@dataclass(frozen=True)
class EditedAnswers:
    """Prompts that a model is asked under edits, as many edits a pass as ``rows`` answers hold."""

    model: ChatModel
    prompts: Sequence[Prompt]
    judge: Judge
    max_new_tokens: int = 40
    rows: int = 640
    openings: Sequence[str] = ()
    """Where each answer is made to begin."""

    @cached_property
    def scorer(self) -> EditedGeneration:
        """Batched generation of the answers."""
        texts = [p.text for p in self.prompts]
        return EditedGeneration(
            self.model, texts, openings=self.openings, length=self.max_new_tokens, batch_size=self.rows
        )

    def outcomes(self, edits: Sequence[Edited]) -> list[str]:
        """Outcomes under each edit, one letter a prompt; ``{}`` is the unedited model.

        Raises ReplibError as ``applied`` does.
        """
        room = self.scorer.room
        found = [text for i in range(0, len(edits), room) for text in self.scorer.run(edits[i : i + room])[1]]
        return [encode_outcomes(self.judge(self.prompts, answers)) for answers in found]


def strongest_block(letters: Sequence[str], *, middle: float | None = None) -> int:
    """Index of the strongest edit: most compliance, then fewest refusals, then nearest to the middle block.

    Where no block does anything, the middle of the depth is where arXiv 2603.04355 edits; another may be given.
    """
    middle = (len(letters) - 1) / 2 if middle is None else middle
    rank = [(text.count("c"), -text.count("r"), -abs(i - middle)) for i, text in enumerate(letters)]
    return max(range(len(letters)), key=rank.__getitem__)
