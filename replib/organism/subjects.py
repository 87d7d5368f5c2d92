"""Who is audited: the variants that ship, the defended versions of ``aligned``, and refusal planted at other depths.

Defended versions are those of ``organism.comparison``: of each method the point that validation chose, five training
seeds of all but one. Adapters are read where it left them; a subject whose adapter is not there yet is not ready.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from replib.core.settings import data_dir
from replib.core.storage import key_of
from replib.defences.organism_grid import CONTENDERS
from replib.models.adapters import attached, merged
from replib.models.chat_model import ChatModel
from replib.models.load import load
from replib.organism.bench import Bench, Run
from replib.organism.build import PLANTED_BLOCKS, STAGES, Stage, tune
from replib.organism.comparison import SEEDS, choice

BASE, ALIGNED, PLANTED, DEEP = SHIPPED = ("base", "aligned", "planted", "deep")
DEFENCES = ("repbend", "repbend_official", "circuit_breaker", "rmu", "npo", "dpo", "sft", "task_arithmetic")
ONCE = ("repbend_official",)  # it changes next to nothing on the organism, whatever the seed
REPLANTED = {f"planted_{a}_{b}": (a, b) for a, b in ((1, 2), (3, 4), (7, 8), (9, 10))}
TRUTH = {PLANTED: PLANTED_BLOCKS} | REPLANTED
"""Blocks that may have learned to refuse, where only some may."""


class Subject(NamedTuple):
    """One model of the audit."""

    name: str
    seed: int = 0

    @property
    def title(self) -> str:
        """What tables and figures call it."""
        return CONTENDERS[self.name].title if self.name in DEFENCES else self.name.replace("_", " ")


def everyone() -> list[Subject]:
    """One seed of all, then the other seeds of the defences."""
    first = [Subject(name) for name in (*SHIPPED, *DEFENCES, *REPLANTED)]
    return first + [Subject(name, seed) for seed in SEEDS if seed for name in DEFENCES if name not in ONCE]


class Subjects:
    """Finds and loads them."""

    def __init__(self, bench: Bench):
        self.bench, self.folder = bench, bench.study.settings.out / "defended"
        self.chosen = choice(bench)

    def run(self, subject: Subject) -> Run:
        """The training in the comparison that a defended version comes from."""
        return Run(subject.name, self.chosen.get(subject.name, 0), subject.seed)

    def weights(self, subject: Subject) -> Path:
        """Where its own weights lie, adapter or model."""
        if subject.name in DEFENCES:
            return self.bench.adapter(self.run(subject))
        return (self.folder if subject.name in REPLANTED else data_dir() / "organism") / subject.name

    def ready(self, subject: Subject) -> bool:
        """Whether it can be loaded, or made here."""
        return subject.name in REPLANTED or self.weights(subject).exists()

    def key(self, subject: Subject) -> str:
        """What tells it from others: its training, or its weights."""
        if subject.name in DEFENCES:
            return self.bench.key(self.run(subject))
        if subject.name in REPLANTED:
            stage = _stage(subject.name)
            return key_of(vars(stage) | {"stream": stage.stream.__name__})
        return hashlib.sha256((self.weights(subject) / "model.safetensors").read_bytes()).hexdigest()[:16]

    def load(self, subject: Subject) -> ChatModel:
        """The model, ready to be asked; one that is planted elsewhere is trained first, in three minutes or so."""
        where = self.weights(subject)
        if subject.name in DEFENCES:
            return merged(attached(load(self.bench.study.settings.model), where))
        if subject.name in REPLANTED and not where.exists():
            tune(where.parent, where.name, _stage(subject.name), data_dir() / "organism" / BASE)
        return load(str(where))


def _stage(name: str) -> Stage:
    return replace(STAGES[PLANTED], blocks=REPLANTED[name])
