"""The same prompts asked under one edit after another: what became of each answer, a letter each.

Letters are those of ``Outcome``: r(efusal), c(ompliance), d(egenerate). They keep what a rate forgets: which prompts,
so that edits can be compared prompt by prompt and models seed by seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

from replib.chat import ChatModel
from replib.edits import applied
from replib.judges import Judge
from replib.methods import SiteEdits
from replib.prefix import Prefix
from replib.prompts import Prompt

Edited = Mapping[str, SiteEdits]
"""Edits by the tokens that they act on, and by place: ``{"last_prompt": {("resid_post", 7): one}}``."""
LATE = frozenset({"last_prompt", "response", "decode"})
"""Positions that leave the tokens before the last prompt token as they are."""


@dataclass(frozen=True)
class Asked:
    """Prompts that a model is asked under edits, as many edits a pass as ``rows`` answers hold."""

    model: ChatModel
    prompts: Sequence[Prompt]
    judge: Judge
    max_new_tokens: int = 40
    rows: int = 640

    def letters(self, edits: Sequence[Edited]) -> list[str]:
        """Outcomes under each edit, one letter a prompt; ``{}`` is the unedited model.

        Raises ReplibError as ``applied`` does.
        """
        room = max(1, self.rows // len(self.prompts))
        return [text for i in range(0, len(edits), room) for text in self._pass(edits[i : i + room])]

    def _pass(self, edits: Sequence[Edited]) -> list[str]:
        where = dict.fromkeys(position for each in edits for position in each)
        prefix = self._prefix if LATE.issuperset(where) else None  # read before anything is edited
        with ExitStack() as stack:
            for position in where:
                stack.enter_context(applied(self.model, [e.get(position, {}) for e in edits], positions=position))
            answers = self._answers(len(edits), prefix)
        n, outcomes = len(self.prompts), self.judge([*self.prompts] * len(edits), answers)
        return ["".join(o.value[0] for o in outcomes[i : i + n]) for i in range(0, len(answers), n)]

    def _answers(self, copies: int, prefix: Prefix | None) -> list[str]:
        if prefix:
            return prefix.answers(copies, max_new_tokens=self.max_new_tokens)
        texts = [p.text for p in self.prompts] * copies
        return self.model.complete(self.model.encode(texts), self.max_new_tokens)

    @cached_property
    def _prefix(self) -> Prefix | None:
        """All prompts up to their last token, read once; None where a model cannot be read in parts."""
        found = Prefix.read(self.model, [p.text for p in self.prompts])
        return found if found.whole else None


def strongest(letters: Sequence[str], *, middle: float | None = None) -> int:
    """Which of some edits, block by block, does most: complied with most, then refused least, then nearest the middle.

    Where no block does anything, the middle of the depth is where arXiv 2603.04355 edits; another may be given.
    """
    middle = (len(letters) - 1) / 2 if middle is None else middle
    rank = [(text.count("c"), -text.count("r"), -abs(i - middle)) for i, text in enumerate(letters)]
    return max(range(len(letters)), key=rank.__getitem__)
