"""Filters that count what they leave out, and draws that are the same everywhere.

A draw orders the rows by a hash of the seed and of their own text and takes the first n: every row has the same
chance, the order of the file does not matter, a smaller draw is the beginning of a larger one, and the result is the
same on every machine.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from replib.core.errors import ReplibError
from replib.core.storage import content_hash
from replib.prompts import Contrast, Dialogue, Prompt
from replib.tables import clean

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Build:
    """How one group of rows came about."""

    name: str
    source: str
    """File and its SHA-256, or hub id, revision and split."""
    seed: int
    asked: int | None
    """Rows asked for; None: all."""
    n: int
    """Different rows there are."""
    hash: str
    """``content_hash`` of the rows in their order."""
    steps: tuple[tuple[str, int], ...]
    """What each filter kept, and how many rows were left after it."""
    times: int = 1
    """How often each row stands in the mix."""

    def table(self) -> pd.DataFrame:
        """One row a filter. Columns: name, step, rows (left after it), dropped (by it)."""
        table = pd.DataFrame(self.steps, columns=["step", "rows"])
        table.insert(0, "name", self.name)
        return table.assign(dropped=-table["rows"].diff().fillna(0).astype(int))


class Built(NamedTuple):
    """Rows of one group and how they came about."""

    rows: list[Any]
    build: Build


class Sieve:
    """Rows on their way through filters, with the number left after each."""

    def __init__(self, name: str, source: str, rows: Iterable[Any]):
        self.name, self.source, self.rows = name, source, list(rows)
        self.steps = [("rows of the source", len(self.rows))]

    def keep(self, what: str, test: Callable[[Any], object]) -> Sieve:
        """Leave out the rows that fail a test."""
        return self._left(what, [row for row in self.rows if test(row)])

    def once(self, what: str, key: Callable[[Any], object]) -> Sieve:
        """Leave out rows whose key was there before: the first of them stays."""
        first: dict[object, Any] = {}
        for row in self.rows:
            first.setdefault(key(row), row)
        return self._left(what, list(first.values()))

    def records(self, make: Callable[[Any], Any]) -> Sieve:
        """Turn rows into contrasts or dialogues."""
        self.rows = [make(row) for row in self.rows]
        return self

    def built(self, *, n: int | None = None, seed: int = 0, avoid: Iterable[str | Prompt] = ()) -> Built:
        """Drop what is empty, repeated or in ``avoid``; then draw n rows, or take all there are."""
        if n is not None and n < 1:
            raise ReplibError(f"{self.name}: n must be at least 1; got {n}. None takes all there are.")
        self.keep("prompt and answers not empty", lambda row: all(texts(row)))
        self.once("prompt and answers not repeated", texts)
        self._avoid(avoid)
        if not self.rows:
            raise ReplibError(f"{self.name}: no row of {self.source} is left. {self._told()}. Check the file.")
        order = sorted(self.rows, key=lambda row: content_hash([str(seed), self.name, content_hash([row])]))
        self._left(f"drawn with seed {seed}", order[:n])
        if n is not None and len(order) < n:
            log.warning("%s: %d rows were asked for, all %d there are were taken", self.name, n, len(order))
        steps, digest = tuple(self.steps), content_hash(self.rows)
        log.info("%s: %s", self.name, self._told())
        return Built(self.rows, Build(self.name, self.source, seed, n, len(self.rows), digest, steps))

    def _avoid(self, avoid: Iterable[str | Prompt]) -> None:
        """Leave out prompts of an evaluation set: the same letter by letter, then the same words."""
        exact = evaluated(avoid)
        if not exact:
            return
        words = {same_words(text) for text in exact}
        self.keep("prompt not in the evaluation set", lambda row: row.prompt not in exact)
        self.keep("nor with other case, blanks or punctuation", lambda row: same_words(row.prompt) not in words)
        if dropped := self.steps[-3][1] - len(self.rows):
            log.warning("%s: %d rows left out, their prompts are in the evaluation set", self.name, dropped)

    def _left(self, what: str, rows: list[Any]) -> Sieve:
        self.rows = rows
        self.steps.append((what, len(rows)))
        return self

    def _told(self) -> str:
        return "; ".join(f"{what}: {count}" for what, count in self.steps)


def texts(row: Contrast | Dialogue) -> tuple[str, ...]:
    """The prompt and its answers."""
    if isinstance(row, Contrast):
        return row.prompt, row.safe_response, row.unsafe_response
    return row.prompt, row.response


def same_words(text: str) -> str:
    """A text without case, punctuation, repeated blanks and Unicode variants; itself where nothing would be left."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in plain).split()) or text.strip()


def evaluated(avoid: Iterable[str | Prompt]) -> set[str]:
    """The texts of an evaluation set."""
    if isinstance(avoid, str):
        raise ReplibError(f"avoid={avoid!r} is one text; give a list of prompts, as load_prompts returns it.")
    return {clean(p if isinstance(p, str) else p.text) for p in avoid} - {""}
