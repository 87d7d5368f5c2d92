"""What an edit does besides: to harmless and borderline prompts, to the next-token distribution, to perplexity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from replib.audit.judges import Judge, Outcome, spelled
from replib.core.errors import ReplibError
from replib.core.stats import Mean, contrast, letters, mean_over, perplexity, wilson
from replib.core.storage import content_hash, key_of
from replib.data.prompts import Prompt
from replib.edits.apply import Edits, applied
from replib.forced import Forced, Tokens
from replib.models.chat_model import ChatModel


@dataclass(frozen=True)
class Aside:
    """What damage is measured on; the prompts of none of its lists may have fitted an edit."""

    prompts: Mapping[str, Sequence[Prompt]]
    """Prompts by name. ``harmless``: those are also asked for the model's own answers, on which KL and perplexity are
    taken. ``borderline``: harmless ones that sound harmful, whose refusals are over-refusal."""
    texts: Sequence[str] = ()
    """Neutral text, read without a template."""
    tokens: int = 32
    """Of each own answer that is read by force; an answer that is shorter is read to its end."""

    def __post_init__(self) -> None:
        if not all(self.prompts.values()) or not self.prompts.get("harmless"):
            raise ReplibError("Damage is measured on harmless prompts, and no list may be empty: give some.")

    def hashes(self) -> dict[str, Any]:
        """What identifies it in a table."""
        named = {name: content_hash([*prompts]) for name, prompts in self.prompts.items()}
        return named | {"texts": content_hash([*self.texts]), "forced": self.tokens}


class Gauge:
    """Measures the damage of edits of one model; what the unedited model does is found once.

    Make it, and call it, without an edit in place.
    """

    def __init__(self, model: ChatModel, aside: Aside, judge: Judge, *, max_new_tokens: int = 48, batch_size: int = 64):
        self.model, self.aside, self.judge = model, aside, judge
        self.length, self.batch_size = max_new_tokens, batch_size

    def __call__(self, edits: Edits, *, positions: str = "last_prompt", strength: float = 1.0) -> pd.DataFrame:
        """All of it under an edit, a row a metric.

        Args:
            edits: as for ``applied``, one mapping.
            positions: as for ``applied``. While answers are read by force, ``decode`` acts on all their tokens, as it
                does while they are written.
            strength: as for ``applied``.

        Returns:
            metric; ``unedited`` and ``edited`` values; ``low`` and ``high``, the 95 % interval of the edited one;
            ``change`` with its interval ``change_low`` to ``change_high``: a difference of rates on the same prompts,
            a difference in nats, or the factor between perplexities; ``p``, McNemar's exact; ``n`` prompts or texts;
            ``tokens`` behind a mean over tokens.
        """
        before, forced = self.before, self.forced  # before anything is edited
        with applied(self.model, edits, positions=positions, strength=strength):
            after = self._outcomes()
        reading = "response" if positions == "decode" else positions
        with applied(self.model, edits, positions=reading, strength=strength):
            read = {name: part.read() for name, part in forced.items()}
        rows = [row for name in after for row in _rates(name, before[name], after[name])]
        return pd.DataFrame([*rows, *_divergences(read["own answers"]), *_perplexities(read)])

    @property
    def key(self) -> str:
        """What identifies its measures of an edit in a store."""
        return key_of(self.aside.hashes(), self.judge.name, self.length)

    @cached_property
    def before(self) -> dict[str, str]:
        """A letter an answer of the unedited model, by list."""
        return self._outcomes()

    @cached_property
    def forced(self) -> dict[str, Forced]:
        """What is read by force."""
        harmless, size = [p.text for p in self.aside.prompts["harmless"]], self.batch_size
        own = {"own answers": Forced.own(self.model, harmless, tokens=self.aside.tokens, batch_size=size)}
        return own | ({"neutral text": Forced.texts(self.model, self.aside.texts)} if self.aside.texts else {})

    def _outcomes(self) -> dict[str, str]:
        return {name: self._judged(prompts) for name, prompts in self.aside.prompts.items()}

    def _judged(self, prompts: Sequence[Prompt]) -> str:
        texts, size = [p.text for p in prompts], self.batch_size
        answers = self.model.generate(texts, max_new_tokens=self.length, batch_size=size)
        return spelled(self.judge(prompts, answers))


def damage(
    model: ChatModel, edits: Edits, aside: Aside, judge: Judge, *, positions: str = "last_prompt", **options: Any
) -> pd.DataFrame:
    """What ``Gauge`` measures of one edit; options are those of ``Gauge``."""
    return Gauge(model, aside, judge, **options)(edits, positions=positions)


def _rates(name: str, before: str, after: str) -> Iterator[dict[str, Any]]:
    """The three shares of outcomes, each against the unedited model on the same prompts."""
    for outcome in Outcome:
        one, other = (letters([text], outcome) for text in (after, before))
        found, (low, high) = contrast(one, other), wilson(int(one.sum()), one.size)
        values = {"unedited": float(other.mean()), "edited": float(one.mean()), "low": low, "high": high}
        change = {"change": found["difference"], "change_low": found["low"], "change_high": found["high"]}
        yield {"metric": f"{name}: {outcome.value}"} | values | change | {"p": found["p"], "n": one.size}


def _divergences(read: Tokens) -> Iterator[dict[str, Any]]:
    for name, at in (("first token", read.first), ("all tokens", read.first | True)):
        kl = mean_over(read.kl[at], read.row[at])
        yield {"metric": f"KL on own answers, {name} (nats)", "unedited": 0.0} | _told(kl) | _changed(kl)


def _perplexities(read: Mapping[str, Tokens]) -> Iterator[dict[str, Any]]:
    for name, x in read.items():
        base, edited = perplexity(x.base, x.row), perplexity(x.edited, x.row)
        factor = perplexity(x.edited - x.base, x.row)
        yield {"metric": f"perplexity of {name}", "unedited": base.value} | _told(edited) | _changed(factor)


def _told(mean: Mean) -> dict[str, Any]:
    return {"edited": mean.value, "low": mean.low, "high": mean.high, "n": mean.rows, "tokens": mean.tokens}


def _changed(mean: Mean) -> dict[str, Any]:
    return {"change": mean.value, "change_low": mean.low, "change_high": mean.high}
