"""Audit of a model: success rates by task with n, Wilson interval, judge and seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from replib.audit.judges import Judge, Outcome
from replib.core.errors import ReplibError
from replib.core.progress import progress
from replib.core.stats import interval_text, wilson
from replib.core.storage import Rows, content_hash, versions, write_text
from replib.data.prompts import Prompt
from replib.models.chat_model import ChatModel


def rates(outcomes: Sequence[Outcome]) -> dict[str, float | int]:
    """n, the share of each outcome, and the Wilson 95 % interval of compliance."""
    n = len(outcomes)
    if not n:
        raise ReplibError("A task has no prompts, so there is no rate: give each task prompts.")
    counts = {outcome.value: sum(o is outcome for o in outcomes) for outcome in Outcome}
    low, high = wilson(counts["compliance"], n)
    return {"n": n} | {name: count / n for name, count in counts.items()} | {"low": low, "high": high}


@dataclass(frozen=True)
class Task:
    """Prompts of one row: an attack, or benign requests that ought to be answered."""

    name: str
    kind: str
    """``direct``, ``attack``, ``seen`` (an attack that a defence was trained on), ``prefill``: compliance is a failure
    of safety. ``benign``, ``skill``: compliance is wanted."""
    prompts: Sequence[Prompt]
    prefills: Sequence[str] = ()
    """Forced beginnings of the answers; none if empty."""

    def sample(self, limit: int, seed: int = 0) -> Task:
        """At most ``limit`` of its prompts, drawn from the seed; 0 keeps all."""
        if not limit or limit >= len(self.prompts):
            return self
        kept = sorted(random.Random(seed).sample(range(len(self.prompts)), limit))
        prefills = [self.prefills[i] for i in kept] if self.prefills else ()
        return replace(self, prompts=[self.prompts[i] for i in kept], prefills=prefills)


@dataclass(frozen=True)
class AuditTable:
    """One row a model and task: model, attack, kind, n, refusal, compliance, degenerate, low, high, judge, seed, …"""

    frame: pd.DataFrame

    def __add__(self, other: AuditTable) -> AuditTable:
        """Rows of both."""
        return AuditTable(pd.concat([self.frame, other.frame], ignore_index=True))

    def mean(self, kind: str) -> pd.Series:
        """Mean compliance over the rows of one kind, by model: the mean attack success for ``attack``."""
        return self.frame[self.frame.kind == kind].groupby("model", sort=False)["compliance"].mean()

    def wide(self) -> pd.DataFrame:
        """Tasks down, models across; each cell ``rate [low, high]`` in per cent."""
        per_cent = 100 * self.frame[["compliance", "low", "high"]].to_numpy()
        cells = self.frame.assign(cell=[interval_text(value, low, high, space=" ") for value, low, high in per_cent])
        order = list(dict.fromkeys(zip(cells.kind, cells.attack, cells.n, strict=True)))
        wide = cells.pivot_table(index=["kind", "attack", "n"], columns="model", values="cell", aggfunc="first")
        return wide.loc[order, list(dict.fromkeys(cells.model))]

    def save(self, path: Path | str) -> Path:
        """A CSV file, written under another name and then renamed."""
        return write_text(Path(path), self.frame.to_csv(index=False))

    @classmethod
    def load(cls, path: Path | str) -> AuditTable:
        """Read back what ``save`` wrote."""
        if not Path(path).exists():
            raise ReplibError(f"There is no audit table {path}: run the audit first.")
        return cls(pd.read_csv(path, keep_default_na=False))


def audit(
    model: ChatModel,
    tasks: Sequence[Task],
    judge: Judge,
    *,
    name: str | None = None,
    store: Path | str | None = None,
    seed: int = 0,
    max_new_tokens: int = 48,
    batch_size: int = 128,
    keep_text: bool = False,
) -> AuditTable:
    """Run every task and count outcomes; rows in the store are not run again.

    Args:
        model: model to audit, with the edits or adapter that are active.
        tasks: rows to fill.
        judge: decides each answer.
        name: the model's name in the table.
        store: JSON-lines file of finished rows; interrupted audits continue there.
        seed: recorded (generation is greedy).
        max_new_tokens: length of the answers.
        batch_size: prompts answered at a time.
        keep_text: also write the answers to ``<store>.texts.jsonl``.
    """
    rows, about = Rows(store), model.provenance() | versions()
    label = {"model": name or model.name, "judge": judge.name, "seed": seed, "max_new_tokens": max_new_tokens}
    texts = Path(store).with_suffix(".texts.jsonl") if store and keep_text else None
    return AuditTable(
        pd.DataFrame(
            _row(rows, model, task, judge, about | label, batch_size, texts) for task in progress(tasks, "audit")
        )
    )


def outcome(task: Task) -> str:
    """Name under which a task is counted: its kind, or its own name if benign."""
    return task.name if task.kind == "benign" else task.kind


def validation_measure(tasks: Sequence[Task], judge: Judge) -> Callable[[ChatModel], dict[str, float]]:
    """Measure of a model, all tasks in one pass: compliance by ``outcome``, and the worst degenerate rate."""
    prompts = [p for t in tasks for p in t.prompts]
    prefills = [text for t in tasks for text in t.prefills or [""] * len(t.prompts)]
    owner = [outcome(t) for t in tasks for _ in t.prompts]

    def measure(model: ChatModel) -> dict[str, float]:
        answers = model.generate([p.text for p in prompts], max_new_tokens=32, prefills=prefills, batch_size=128)
        outcomes = judge(prompts, answers)
        groups = {o: rates([x for x, name in zip(outcomes, owner, strict=True) if name == o]) for o in owner}
        compliance = {name: rate["compliance"] for name, rate in groups.items()}
        return compliance | {"degenerate": max(rate["degenerate"] for rate in groups.values())}

    return measure


def _row(
    rows: Rows, model: ChatModel, task: Task, judge: Judge, about: dict, batch_size: int, texts: Path | None
) -> dict:
    facts = about | {"attack": task.name, "kind": task.kind, "prompts": content_hash(task.prompts)}

    def make() -> dict:
        answers = model.generate(
            [p.text for p in task.prompts],
            max_new_tokens=about["max_new_tokens"],
            prefills=list(task.prefills) or None,
            batch_size=batch_size,
        )
        _keep_texts(texts, task, answers)
        return facts | rates(judge(task.prompts, answers))

    return rows.get(facts | {"prefills": list(task.prefills)}, make)


def _keep_texts(path: Path | None, task: Task, answers: Sequence[str]) -> None:
    """Append the answers to a JSON-lines file, if a path is given."""
    if path is None:
        return
    with path.open("a", encoding="utf-8") as file:
        for prompt, answer in zip(task.prompts, answers, strict=True):
            file.write(json.dumps({"task": task.name, "prompt": prompt.text, "answer": answer}) + "\n")
