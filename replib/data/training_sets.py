"""Training sets of defences from public sets, with the papers' filters and the row count after each.

All builders take ``n`` (None: all rows), ``seed`` (of the draw) and ``avoid`` (prompts of an evaluation set: rows with
the same prompt, letter by letter or but for case, blanks and punctuation, are left out and counted). They return rows
and the ``Provenance`` that says how they came about; ``build.table()`` shows it.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from replib.core.errors import ReplibError
from replib.core.storage import content_hash
from replib.data.files import LISTS, clean
from replib.data.prompts import Contrast, Dialogue, Prompt
from replib.data.public import RowSource, read_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Provenance:
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


class Subset(NamedTuple):
    """Rows of one group and how they came about."""

    rows: list[Any]
    build: Provenance


class FilterPipeline:
    """Rows on their way through filters, with the number left after each."""

    def __init__(self, name: str, source: str, rows: Iterable[Any]):
        self.name, self.source, self.rows = name, source, list(rows)
        self.steps = [("rows of the source", len(self.rows))]

    def keep(self, what: str, test: Callable[[Any], object]) -> FilterPipeline:
        """Leave out the rows that fail a test."""
        return self._left(what, [row for row in self.rows if test(row)])

    def once(self, what: str, key: Callable[[Any], object]) -> FilterPipeline:
        """Leave out rows whose key was there before: the first of them stays."""
        first: dict[object, Any] = {}
        for row in self.rows:
            first.setdefault(key(row), row)
        return self._left(what, list(first.values()))

    def records(self, make: Callable[[Any], Any]) -> FilterPipeline:
        """Turn rows into contrasts or dialogues."""
        self.rows = [make(row) for row in self.rows]
        return self

    def built(self, *, n: int | None = None, seed: int = 0, avoid: Iterable[str | Prompt] = ()) -> Subset:
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
        return Subset(self.rows, Provenance(self.name, self.source, seed, n, len(self.rows), digest, steps))

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

    def _left(self, what: str, rows: list[Any]) -> FilterPipeline:
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


_TrainingRow = Mapping[str, Any]


def _cleaned(rows: Iterable[_TrainingRow]) -> Iterator[dict[str, str]]:
    return ({column: clean(cell) for column, cell in row.items()} for row in rows)


_WILDGUARD: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "safe": (("unharmful", "compliance", "unharmful"), ("harmful", "refusal", "unharmful")),
    "unsafe": (("harmful", "compliance", ""),),
}
"""Harm of the prompt, refusal and harm of the response; empty: whatever it says (RepBend, dataset.py:86-98)."""


def wildguardmix(
    side: str,
    source: RowSource | None = "allenai/wildguardmix",
    *,
    n: int | None = None,
    seed: int = 0,
    avoid: Iterable[str | Prompt] = (),
) -> Subset:
    """Unpaired answers of WildGuardMix as dialogues; ``label`` is the prompt's harm.

    ``safe``: harmless prompts answered and harmful ones refused, the response unharmful. ``unsafe``: harmful prompts
    complied with, whatever ``response_harm_label`` says. Rows without a response, over half of the set, are left out;
    so are repeated ones, which the authors keep.

    Raises:
        ReplibError: as ``read_rows``; ``side`` is neither; no row has the labels that the filters ask for.
    """
    if side not in _WILDGUARD:
        raise ReplibError(f"WildGuardMix has the sides safe and unsafe, not {side!r}.")
    called, rows = read_rows("wildguardmix", source)
    sieve = FilterPipeline(f"wildguardmix {side}", called, _cleaned(rows))
    sieve.keep("with a response", lambda row: row["response"])
    sieve.keep(f"labels of the {side} side", lambda row: any(_labelled(row, want) for want in _WILDGUARD[side]))
    return sieve.records(_wildguard).built(n=n, seed=seed, avoid=avoid)


def _labelled(row: _TrainingRow, wanted: Sequence[str]) -> bool:
    found = (row["prompt_harm_label"], row["response_refusal_label"], row["response_harm_label"])
    return all(want in ("", label) for want, label in zip(wanted, found, strict=True))


def _wildguard(row: _TrainingRow) -> Dialogue:
    label = {"harmful": "harmful", "unharmful": "harmless"}[row["prompt_harm_label"]]
    return Dialogue(row["prompt"], row["response"], "fit", label, way="wildguardmix")


def wildjailbreak_pairs(
    source: RowSource | None, *, n: int | None = None, seed: int = 0, avoid: Iterable[str | Prompt] = ()
) -> Subset:
    """Contrasts of RepBend's own ``wildjailbreak.jsonl``: harmful prompts, each once, with both answers.

    The public TSV has the safe side only: ``wildjailbreak_safe``, to be paired by ``pair`` with answers of your own.
    """
    called, rows = read_rows("wildjailbreak_pairs", source)
    sieve = FilterPipeline("wildjailbreak pairs", called, _cleaned(rows))
    sieve.keep("prompt_type harmful", lambda row: row["prompt_type"] == "harmful")
    sieve.keep("with both answers", lambda row: row["harmless_answer"] and row["harmful_answer"])
    sieve.once("prompt not repeated", lambda row: row["prompt"])
    sieve.records(lambda r: Contrast(r["prompt"], r["harmless_answer"], r["harmful_answer"], "fit", way="vanilla"))
    return sieve.built(n=n, seed=seed, avoid=avoid)


def wildjailbreak_safe(
    source: RowSource | None = "allenai/wildjailbreak",
    *,
    n: int | None = None,
    seed: int = 0,
    avoid: Iterable[str | Prompt] = (),
) -> Subset:
    """Refusals of vanilla harmful prompts, each prompt once, from the public training TSV: its ``completion``.

    The authors of RepBend drop repeated ``vanilla`` over all rows and may so keep the completion of an adversarial
    rewriting; here only ``data_type`` vanilla_harmful is read, whose completion answers the vanilla prompt itself.
    """
    called, rows = read_rows("wildjailbreak", source)
    sieve = FilterPipeline("wildjailbreak safe", called, _cleaned(rows))
    sieve.keep("data_type vanilla_harmful", lambda row: row["data_type"] == "vanilla_harmful")
    sieve.once("vanilla not repeated", lambda row: row["vanilla"])
    sieve.records(lambda row: Dialogue(row["vanilla"], row["completion"], "fit", "harmful", way="vanilla"))
    return sieve.built(n=n, seed=seed, avoid=avoid)


def pair(safe: Iterable[Dialogue], unsafe: Iterable[Dialogue]) -> list[Contrast]:
    """Contrasts of the prompts that have an answer on both sides, in the order of the safe ones."""
    answers = {d.prompt: d.response for d in unsafe}
    return [
        Contrast(d.prompt, d.response, answers[d.prompt], d.split, d.group, d.way) for d in safe if d.prompt in answers
    ]


def ultrachat(
    split: str = "train_sft",
    source: RowSource | None = "HuggingFaceH4/ultrachat_200k",
    *,
    n: int | None = None,
    seed: int = 0,
    avoid: Iterable[str | Prompt] = (),
) -> Subset:
    """First exchanges of UltraChat-200k: the first user turn is the prompt, the assistant turn after it the response.

    Later turns are left out, because they cannot be read without the ones before (the papers read whole dialogues,
    and the first 10,001 of them). A dialogue that does not open with user and assistant, such as one with a system
    turn, is left out and counted. ``split`` names the part of a hub set (train_sft, test_sft); ignored for files.
    """
    called, rows = read_rows("ultrachat", source, split=split)
    sieve = FilterPipeline(f"ultrachat {split}", called, (first_exchange(row["messages"]) for row in rows))
    sieve.keep("opens with user and assistant", lambda exchange: exchange is not None)
    sieve.records(lambda turns: Dialogue(turns[0], turns[1], "fit", "harmless", way="ultrachat"))
    return sieve.built(n=n, seed=seed, avoid=avoid)


def first_exchange(messages: Any) -> tuple[str, str] | None:
    """The first user turn and the assistant turn after it; None where the dialogue opens otherwise."""
    if not isinstance(messages, LISTS) or not all(isinstance(turn, Mapping) for turn in messages):
        raise ReplibError(
            f"messages must be a list of turns with role and content, not {str(messages)[:60]!r}; "
            "keep UltraChat as Parquet or JSONL, a CSV cannot hold it."
        )
    if [turn.get("role") for turn in messages[:2]] != ["user", "assistant"]:
        return None
    return clean(messages[0].get("content")), clean(messages[1].get("content"))


def circuit_breakers(
    source: RowSource | None,
    *,
    side: str = "unsafe",
    n: int | None = None,
    seed: int = 0,
    avoid: Iterable[str | Prompt] = (),
) -> Subset:
    """Circuit Breaker's own set, train or val: harmful prompts with ``output`` (``unsafe``) or ``llama3_output``.

    The latter (``safe``) are refusals of Llama-3; the val file has none.
    """
    keys = {"unsafe": ("circuit_breakers", "output"), "safe": ("circuit_breaker_refusals", "llama3_output")}
    if side not in keys:
        raise ReplibError(f"the circuit breakers set has the sides unsafe and safe, not {side!r}.")
    key, answer = keys[side]
    called, rows = read_rows(key, source)
    sieve = FilterPipeline(f"circuit breakers {side}", called, _cleaned(rows))
    sieve.records(lambda row: Dialogue(row["prompt"], row[answer], "fit", "harmful", way="circuit_breakers"))
    return sieve.built(n=n, seed=seed, avoid=avoid)


def xstest_compliances(
    source: RowSource | None, *, n: int | None = None, seed: int = 0, avoid: Iterable[str | Prompt] = ()
) -> Subset:
    """XSTest prompts that GPT-4 answered in full (``final_label`` 1_full_compliance), as Circuit Breaker retains them.

    A model trained on these has seen 230 of the 450 prompts: its XSTest score is contaminated and must not be
    reported, or ``avoid`` must name them. One of the 230 is a contrast prompt, labelled harmful here; the recipe
    retains it too.
    """
    called, rows = read_rows("xstest_completions", source)
    sieve = FilterPipeline("xstest compliances", called, _cleaned(rows))
    sieve.keep("final_label 1_full_compliance", lambda row: row["final_label"] == "1_full_compliance")
    return sieve.records(_xstest).built(n=n, seed=seed, avoid=avoid)


def _xstest(row: _TrainingRow) -> Dialogue:
    label = "harmful" if row["type"].startswith("contrast_") else "borderline"
    return Dialogue(row["prompt"], row["completion"], "fit", label, row["type"], "xstest")
