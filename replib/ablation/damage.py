"""Damage of an edit: harmless and borderline prompts, next-token distribution, perplexity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from replib.audit.judges import Judge, Outcome, encode_outcomes
from replib.core.errors import ReplibError
from replib.core.stats import Mean, contrast, kl, mean_over, outcome_matrix, perplexity, wilson
from replib.core.storage import content_hash, key_of
from replib.data.prompts import Prompt
from replib.edits.apply import Edits, applied
from replib.models.chat_model import ChatModel, evaluating
from replib.models.forward import answer_states, answer_tokens, in_chunks
from replib.models.tokens import Batch, Row


def token_kl(base: Float[Tensor, "*tokens vocab"], edited: Float[Tensor, "*tokens vocab"]) -> Float[Tensor, " *tokens"]:
    """KL(base || edited) of each next-token distribution, nats, float64, from exact log-softmax.

    A token that the base suppresses (logit −inf) adds nothing; one that the edit alone suppresses makes it inf. NaN
    only where logits are.
    """
    return kl(base.double().log_softmax(-1), edited.double().log_softmax(-1))


class Tokens(NamedTuple):
    """Measures of each teacher-forced token, ``[tokens]``, float64 on the CPU."""

    row: Int[Tensor, " tokens"]
    """Of which text or prompt it is."""
    first: Bool[Tensor, " tokens"]
    """Whether it is the first of its row."""
    base: Float[Tensor, " tokens"]
    """−log p under the unedited model, nats."""
    edited: Float[Tensor, " tokens"]
    """The same under the edits in place."""
    kl: Float[Tensor, " tokens"]
    """KL(unedited || edited) of the distribution that it was drawn from, nats."""


@dataclass(frozen=True)
class TeacherForced:
    """Batches of rows to be read by force, and what the unedited model makes of them."""

    model: ChatModel
    batches: tuple[Batch, ...]
    states: tuple[Tensor, ...]
    """What left the final norm where each counted token is predicted, unedited; ``[tokens, dim]`` a batch."""

    @classmethod
    @torch.no_grad()
    def own(cls, model: ChatModel, prompts: Sequence[str], *, tokens: int = 32, batch_size: int = 64) -> TeacherForced:
        """The model's own greedy answers, ``tokens`` long or to their end, which is counted too."""
        batches = [model.encode(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
        return cls._of(model, (_answered(model, batch, tokens) for batch in batches))

    @classmethod
    def texts(
        cls, model: ChatModel, texts: Sequence[str], *, length: int = 128, context: int = 32, batch_size: int = 16
    ) -> TeacherForced:
        """Plain texts without a template, the first ``length`` tokens of each.

        The first ``context`` of them stand as the prompt and are not counted: an edit of prompt tokens acts there.

        Raises ReplibError where no text is longer than the context.
        """
        read = model.tokenizer(list(texts), truncation=True, max_length=min(length, model.context))["input_ids"]
        rows = [Row(ids, (0, context), context) for ids in read if len(ids) > context]
        if not rows:
            raise ReplibError(f"No text is longer than {context} tokens: join lines, or give longer texts.")
        return cls._of(model, (model.pad(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)))

    @classmethod
    @torch.no_grad()
    def _of(cls, model: ChatModel, batches: Iterator[Batch]) -> TeacherForced:
        kept = tuple(batches)
        with evaluating(model.model):
            return cls(model, kept, tuple(answer_states(model, batch) for batch in kept))

    @torch.no_grad()
    def read(self) -> Tokens:
        """Every counted token under the edits now in place, beside the unedited model."""
        with evaluating(self.model.model):
            parts = [self._tokens(*pair) for pair in zip(self.batches, self.states, strict=True)]
        starts = np.cumsum([0, *(len(batch.input_ids) for batch in self.batches)])
        moved = [part._replace(row=part.row + start) for part, start in zip(parts, starts[:-1].tolist(), strict=True)]
        return Tokens(*(torch.cat(column) for column in zip(*moved, strict=True)))

    def _tokens(self, batch: Batch, before: Tensor) -> Tokens:
        def stretch(b: Tensor, a: Tensor, token: Tensor) -> Tensor:
            base, edited = self.model.logits(b), self.model.logits(a)
            losses = [F.cross_entropy(x.double(), token, reduction="none") for x in (base, edited)]
            return torch.stack([*losses, token_kl(base, edited)]).cpu()

        after, tokens = answer_states(self.model, batch), answer_tokens(batch)
        row = batch.response_mask.nonzero()[:, 0].cpu()
        first = torch.ones_like(row, dtype=torch.bool)
        first[1:] = row[1:] != row[:-1]
        return Tokens(row, first, *torch.cat(in_chunks(self.model, stretch, before, after, tokens), 1))


def _answered(model: ChatModel, batch: Batch, tokens: int) -> Batch:
    new = model.continued(batch, tokens)[:, batch.input_ids.shape[1] :]
    ends = model.ends(new)
    return batch.answered(new, ends.cumsum(1) - ends.long() == 0)


@dataclass(frozen=True)
class DamageSets:
    """Prompts and texts on which damage is measured; none of them may have fitted an edit."""

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
        """Content hashes, for a table."""
        named = {name: content_hash([*prompts]) for name, prompts in self.prompts.items()}
        return named | {"texts": content_hash([*self.texts]), "forced": self.tokens}


class DamageMeter:
    """Measures the damage of edits of one model; what the unedited model does is found once.

    Make it, and call it, without an edit in place.
    """

    def __init__(
        self, model: ChatModel, aside: DamageSets, judge: Judge, *, max_new_tokens: int = 48, batch_size: int = 64
    ):
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
        """Key of its measures in a store."""
        return key_of(self.aside.hashes(), self.judge.name, self.length)

    @cached_property
    def before(self) -> dict[str, str]:
        """A letter an answer of the unedited model, by list."""
        return self._outcomes()

    @cached_property
    def forced(self) -> dict[str, TeacherForced]:
        """Teacher-forced reading."""
        harmless, size = [p.text for p in self.aside.prompts["harmless"]], self.batch_size
        own = {"own answers": TeacherForced.own(self.model, harmless, tokens=self.aside.tokens, batch_size=size)}
        return own | ({"neutral text": TeacherForced.texts(self.model, self.aside.texts)} if self.aside.texts else {})

    def _outcomes(self) -> dict[str, str]:
        return {name: self._judged(prompts) for name, prompts in self.aside.prompts.items()}

    def _judged(self, prompts: Sequence[Prompt]) -> str:
        texts, size = [p.text for p in prompts], self.batch_size
        answers = self.model.generate(texts, max_new_tokens=self.length, batch_size=size)
        return encode_outcomes(self.judge(prompts, answers))


def _rates(name: str, before: str, after: str) -> Iterator[dict[str, Any]]:
    """The three shares of outcomes, each against the unedited model on the same prompts."""
    for outcome in Outcome:
        one, other = (outcome_matrix([text], outcome) for text in (after, before))
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
