"""The same prompts asked under one edit after another: what became of each answer, a letter each.

Letters are those of ``Outcome``: r(efusal), c(ompliance), d(egenerate). They keep what a rate forgets: which prompts,
so that edits can be compared prompt by prompt and models seed by seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from replib.audit.judges import Judge, spelled
from replib.data.prompts import Prompt
from replib.edits.apply import Edited
from replib.models.chat_model import ChatModel
from replib.scoring import Scorer


@dataclass(frozen=True)
class Asked:
    """Prompts that a model is asked under edits, as many edits a pass as ``rows`` answers hold."""

    model: ChatModel
    prompts: Sequence[Prompt]
    judge: Judge
    max_new_tokens: int = 40
    rows: int = 640
    openings: Sequence[str] = ()
    """Where each answer is made to begin."""

    @cached_property
    def scorer(self) -> Scorer:
        """What puts them to the model."""
        texts = [p.text for p in self.prompts]
        return Scorer(self.model, texts, openings=self.openings, length=self.max_new_tokens, batch_size=self.rows)

    def letters(self, edits: Sequence[Edited]) -> list[str]:
        """Outcomes under each edit, one letter a prompt; ``{}`` is the unedited model.

        Raises ReplibError as ``applied`` does.
        """
        room = self.scorer.room
        found = [text for i in range(0, len(edits), room) for text in self.scorer.run(edits[i : i + room])[1]]
        return [spelled(self.judge(self.prompts, answers)) for answers in found]


def strongest(letters: Sequence[str], *, middle: float | None = None) -> int:
    """Which of some edits, block by block, does most: complied with most, then refused least, then nearest the middle.

    Where no block does anything, the middle of the depth is where arXiv 2603.04355 edits; another may be given.
    """
    middle = (len(letters) - 1) / 2 if middle is None else middle
    rank = [(text.count("c"), -text.count("r"), -abs(i - middle)) for i, text in enumerate(letters)]
    return max(range(len(letters)), key=rank.__getitem__)
