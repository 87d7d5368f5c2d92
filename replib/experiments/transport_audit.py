"""Does a defence hold when the attack is fitted on the defended model: ``python -m replib.experiments.transport_audit``.

    python -m replib.experiments.comparison          # trains the defences; its adapters are read
    python -m replib.experiments.transport_audit            # about an hour of one core, goes on where it stopped
    python -m replib.experiments.transport_audit --pack     # writes data/organism/transport_audit.json

Subjects are those of ``subjects``, questions those of ``examiner``: every subject is asked every question, one seed of
all first. Maps of the undefended model are tried on the others too, and four variants whose refusal is planted at
other depths are trained, to score what is said about depth; their weights stay in the folder of results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from replib.core.errors import ReplibError
from replib.core.settings import Settings, data_dir
from replib.core.storage import Rows, finished, key_of, write_text
from replib.defences.organism_grid import CONTENDERS
from replib.experiments.comparison import SEEDS, choice
from replib.experiments.runner import Bench, Run
from replib.experiments.transport_questions import DESIGN, QUESTIONS, Examination, answered
from replib.models.adapters import attached, merged
from replib.models.chat_model import ChatModel
from replib.models.load import load
from replib.organism.build import PLANTED_BLOCKS, STAGES, Stage, tune

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
        self.bench, self.folder = bench, bench.study.settings.out / "transport_audit"
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


TRAINING = 250  # CPU seconds of a busy core: one planted variant
Task = tuple[Subject, str]


def questions(subject: Subject) -> list[str]:
    """What is asked of a subject: of a model that refuses nothing its gaps alone, of places where they are known."""
    if subject.name == BASE:
        return ["gaps"]
    if subject.name in REPLANTED:
        return ["gaps", "blocks", "places"]
    return [name for name in QUESTIONS if name != "places" or subject.name in (ALIGNED, *TRUTH)]


def key(subjects: Subjects, subject: Subject, question: str) -> str:
    """What a row depends on."""
    return key_of(question, subjects.key(subject), subjects.bench.about, DESIGN)


def missing(subjects: Subjects) -> Iterator[Task]:
    """What is not answered yet, of the subjects that are there."""
    done = finished(subjects.folder)
    for subject in filter(subjects.ready, everyone()):
        for question in questions(subject):
            if key(subjects, subject, question) not in done:
                yield subject, question


def minutes(subjects: Subjects, tasks: list[Task]) -> float:
    """What that costs, in minutes of one busy core."""
    untrained = {s for s, _ in tasks if s.name in REPLANTED and not subjects.weights(s).exists()}
    return (sum(QUESTIONS[question][1] for _, question in tasks) + TRAINING * len(untrained)) / 60


def run(subjects: Subjects) -> None:
    """Answer what is missing; each answer is on disk before the next question is asked."""
    rows, tasks = Rows(subjects.folder / "part-1.jsonl"), list(missing(subjects))
    absent = [f"{s.title} {s.seed}" for s in everyone() if not subjects.ready(s)]
    print(f"{len(tasks)} questions, about {minutes(subjects, tasks):.0f} core minutes", flush=True)
    if absent:
        print(f"not trained yet, run organism.comparison first: {', '.join(absent)}", flush=True)
    undefended, case = Examination(subjects.bench.study.model, subjects.bench.study), None
    for i, (subject, question) in enumerate(tasks):
        if case is None or subject != tasks[i - 1][0]:
            case = Examination(subjects.load(subject), subjects.bench.study, undefended)
        row = subject._asdict() | {"question": question, "answer": answered(case, question)}
        rows.put(key(subjects, subject, question), row)
        left = minutes(subjects, tasks[i + 1 :])
        print(f"{subject.title}, seed {subject.seed}, {question}: done; {left:.0f} core minutes left", flush=True)


def pack(subjects: Subjects) -> Path:
    """Write what is answered to ``data/organism/transport_audit.json``, a line a subject."""
    done, lines = finished(subjects.folder), []
    for subject in everyone():
        keys = {question: key(subjects, subject, question) for question in questions(subject)}
        answers = {question: done[k]["answer"] for question, k in keys.items() if k in done}
        if answers:
            lines.append(_line(subject, answers))
    if not lines:
        raise ReplibError(
            f"Nothing is answered in {subjects.folder}: run python -m replib.experiments.transport_audit first."
        )
    about = {"about": subjects.bench.about, "design": DESIGN, "chosen": subjects.chosen}
    head = json.dumps(about, indent=1)[:-2]
    path = data_dir() / "organism" / "transport_audit.json"
    write_text(path, f'{head},\n "subjects": [\n' + ",\n".join(lines) + "\n]}\n")
    print(f"{len(lines)} of {len(everyone())} subjects, {path.stat().st_size / 1e3:.0f} kB: {path}")
    return path


def _line(subject: Subject, answers: dict[str, Any]) -> str:
    planted = {"planted": TRUTH[subject.name]} if subject.name in TRUTH else {}
    return json.dumps(subject._asdict() | {"title": subject.title} | planted | answers, separators=(",", ":"))


def main() -> None:
    """Command line: ask what is missing, or pack what is answered."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--pack", action="store_true", help="write data/organism/transport_audit.json from what is answered"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    subjects = Subjects(Bench(Settings()))
    if arguments.pack:
        pack(subjects)
    else:
        run(subjects)


if __name__ == "__main__":
    main()
