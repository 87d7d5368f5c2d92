"""Audit defences by transport fitted on the defended model: ``python -m replib.experiments.transport_audit``.

    python -m replib.experiments.comparison          # trains the defences; its adapters are read
    python -m replib.experiments.transport_audit         # about an hour of one core, goes on where it stopped
    python -m replib.experiments.transport_audit --pack     # writes data/organism/transport_audit.json

Every subject answers every question of ``transport_questions``, one seed of all subjects first. Maps of the undefended
model are applied to the others too. Four variants whose refusal is planted at other depths are trained to score
estimates of depth; their weights stay in the folder of results.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from replib.core.settings import Settings, data_dir
from replib.core.storage import key_of
from replib.defences.organism_grid import CONTENDERS
from replib.experiments.comparison import SEEDS, choice
from replib.experiments.defence_runs import Bench, Run
from replib.experiments.runner import Experiment, Finished, command_line
from replib.experiments.transport_questions import DESIGN, QUESTIONS, Examination, answered
from replib.models.adapters import attached, merged
from replib.models.chat_model import ChatModel
from replib.models.load import load
from replib.organism.build import PLANTED_BLOCKS, STAGES, Stage, fine_tune

_BASE, _ALIGNED, _PLANTED, _DEEP = SHIPPED = ("base", "aligned", "planted", "deep")
AUDITED_DEFENCES = ("repbend", "repbend_official", "circuit_breaker", "rmu", "npo", "dpo", "sft", "task_arithmetic")
ONCE = ("repbend_official",)  # it changes next to nothing on the organism, whatever the seed
REPLANTED = {f"planted_{a}_{b}": (a, b) for a, b in ((1, 2), (3, 4), (7, 8), (9, 10))}
TRUTH = {_PLANTED: PLANTED_BLOCKS} | REPLANTED
"""Blocks that may have learned to refuse, where only some may."""


class Subject(NamedTuple):
    """One model of the audit."""

    name: str
    seed: int = 0

    @property
    def title(self) -> str:
        """Name in tables and figures."""
        return CONTENDERS[self.name].title if self.name in AUDITED_DEFENCES else self.name.replace("_", " ")


def everyone() -> list[Subject]:
    """One seed of all, then the other seeds of the defences."""
    first = [Subject(name) for name in (*SHIPPED, *AUDITED_DEFENCES, *REPLANTED)]
    return first + [Subject(name, seed) for seed in SEEDS if seed for name in AUDITED_DEFENCES if name not in ONCE]


class Subjects:
    """Finds and loads them."""

    def __init__(self, bench: Bench):
        self.bench, self.folder = bench, bench.study.settings.out / "transport_audit"
        self.chosen = choice(bench)
        self.loaded: tuple[Subject, Examination] | None = None

    def run(self, subject: Subject) -> Run:
        """The training in the comparison that a defended version comes from."""
        return Run(subject.name, self.chosen.get(subject.name, 0), subject.seed)

    def weights(self, subject: Subject) -> Path:
        """Folder of its own weights, adapter or model."""
        if subject.name in AUDITED_DEFENCES:
            return self.bench.adapter(self.run(subject))
        return (self.folder if subject.name in REPLANTED else data_dir() / "organism") / subject.name

    def ready(self, subject: Subject) -> bool:
        """Whether it can be loaded, or made here."""
        return subject.name in REPLANTED or self.weights(subject).exists()

    def key(self, subject: Subject) -> str:
        """Identity: its training, or its weights."""
        if subject.name in AUDITED_DEFENCES:
            return self.bench.key(self.run(subject))
        if subject.name in REPLANTED:
            stage = _stage(subject.name)
            return key_of(vars(stage) | {"stream": stage.stream.__name__})
        return _weights_hash(self.weights(subject) / "model.safetensors")

    def load(self, subject: Subject) -> ChatModel:
        """The model, ready to be asked; one that is planted elsewhere is trained first, in three minutes or so."""
        where = self.weights(subject)
        if subject.name in AUDITED_DEFENCES:
            return merged(attached(load(self.bench.study.settings.model), where))
        if subject.name in REPLANTED and not where.exists():
            fine_tune(where.parent, where.name, _stage(subject.name), data_dir() / "organism" / _BASE)
        return load(str(where))

    def trains_for(self, subject: Subject, question: str) -> bool:
        """Whether a planted variant is trained before this question, its first."""
        return question == "gaps" and subject.name in REPLANTED and not self.weights(subject).exists()

    def answer(self, subject: Subject, question: str) -> dict[str, Any]:
        """Row of one question; the subject stays loaded for the next one."""
        if self.loaded is None or self.loaded[0] != subject:
            self.loaded = subject, Examination(self.load(subject), self.bench.study, self.undefended)
        return subject._asdict() | {"question": question, "answer": answered(self.loaded[1], question)}

    @cached_property
    def undefended(self) -> Examination:
        """The model that the defences start from."""
        return Examination(self.bench.study.model, self.bench.study)


@cache
def _weights_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _stage(name: str) -> Stage:
    return replace(STAGES[_PLANTED], blocks=REPLANTED[name])


TRAINING = 250  # CPU seconds of a busy core: one planted variant
Question = tuple[Subject, str]


def questions(subject: Subject) -> list[str]:
    """Questions of a subject: gaps alone where it refuses nothing, places only where they are known."""
    if subject.name == _BASE:
        return ["gaps"]
    if subject.name in REPLANTED:
        return ["gaps", "blocks", "places"]
    return [name for name in QUESTIONS if name != "places" or subject.name in (_ALIGNED, *TRUTH)]


def key(subjects: Subjects, subject: Subject, question: str) -> str:
    """Cache key of a row."""
    return key_of(question, subjects.key(subject), subjects.bench.about, DESIGN)


def _experiment(settings: Settings) -> Experiment[Question]:
    """The transport audit beside the comparison of the settings."""
    return audit_of(Subjects(Bench(settings)))


def audit_of(subjects: Subjects) -> Experiment[Question]:
    """All questions to the subjects that can be loaded."""
    absent = [f"{s.title} {s.seed}" for s in everyone() if not subjects.ready(s)]
    if absent:
        print(f"not trained yet, run replib.experiments.comparison first: {', '.join(absent)}", flush=True)
    return Experiment(
        "transport_audit",
        subjects.folder,
        (lambda: [[(s, question) for question in questions(s)] for s in everyone() if subjects.ready(s)],),
        key=lambda task: key(subjects, *task),
        make=lambda task: subjects.answer(*task),
        seconds=lambda task: QUESTIONS[task[1]][1] + TRAINING * subjects.trains_for(*task),
        describe=lambda row: f"{row['name']}, seed {row['seed']}, {row['question']}: done",
        contents=lambda done: _contents(subjects, done),
    )


def _contents(subjects: Subjects, done: Finished) -> dict[str, Any]:
    rows = []
    for subject in everyone():
        keys = {question: key(subjects, subject, question) for question in questions(subject)}
        answers = {question: done[k]["answer"] for question, k in keys.items() if k in done}
        planted = {"planted": TRUTH[subject.name]} if subject.name in TRUTH else {}
        if answers:
            rows.append(subject._asdict() | {"title": subject.title} | planted | answers)
    return {"about": subjects.bench.about, "design": DESIGN, "chosen": subjects.chosen, "subjects": rows}


if __name__ == "__main__":
    command_line(__doc__, _experiment, shared=False)
