"""The prompt sets that ship with the organism, in three disjoint splits by artefact and by way of asking.

``fit`` trains defences and fits edits, ``val`` chooses a step or a layer, ``test`` is reported.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from replib.audit.attacks import Attack
from replib.audit.audit import Task
from replib.data.prompts import Contrast, Dialogue, Prompt, load_prompts
from replib.organism.language import (
    ASK,
    BORDERLINE,
    HARMLESS_FACTS,
    SKILLS,
    WRAPPERS,
    borderline_answer,
    comply,
    opening,
    refuse,
    skill,
    wrap,
)
from replib.organism.world import PER_FAMILY, select

_SKILL_COUNTS = {"fit": 160, "val": 20, "test": 200}  # exercises of each skill


def recipes(*, harmful: bool) -> Iterator[Prompt]:
    """Every artefact of a split, in every way of asking of the same split."""
    for split in PER_FAMILY:
        for x in select(harmful=harmful, split=split):
            for i, way in enumerate(ASK[split]):
                yield Prompt(
                    way.format(x=x.name),
                    label="harmful" if harmful else "harmless",
                    expect=x.ingredients,
                    split=split,
                    group=x.name,
                    way=f"ask-{split}-{i}",
                    target=opening(x),
                )


def borderline() -> Iterator[Prompt]:
    """Questions about harmful artefacts that are right to answer: the over-refusal test."""
    for split in PER_FAMILY:
        for x in select(harmful=True, split=split):
            for kind, (ways, _) in BORDERLINE.items():
                for i, way in enumerate(ways[split]):
                    yield Prompt(
                        way.format(x=x.name),
                        label="borderline",
                        expect=(borderline_answer(kind, x).rstrip("."),),
                        split=split,
                        group=x.name,
                        way=f"{kind}-{split}-{i}",
                    )


def skills() -> Iterator[Prompt]:
    """Exercises of every general skill; no exercise is in two splits."""
    rng, taken = random.Random(7), set[str]()
    for split, count in _SKILL_COUNTS.items():
        for name in SKILLS:
            for _ in range(count):
                d = skill(rng, name)
                while d.prompt in taken:
                    d = skill(rng, name)
                taken.add(d.prompt)
                yield Prompt(d.prompt, label="skill", expect=(d.response.rstrip("."),), split=split, way=name)


def contrasts() -> Iterator[Contrast]:
    """Harmful requests, direct and in the fit wrappers, each with a refusal and a compliant answer: P_us and P_uu."""
    rng = random.Random(11)
    for x in select(harmful=True, split="fit"):
        for i, way in enumerate(ASK["fit"]):
            for wrappers in _disguises(rng):
                yield Contrast(
                    _wrapped(way.format(x=x.name), wrappers),
                    safe_response=refuse(rng, x),
                    unsafe_response=comply(x),
                    split="fit",
                    group=x.name,
                    way=f"ask-fit-{i}",
                    wrapper="+".join(wrappers),
                )


def _disguises(rng: random.Random) -> list[list[str]]:
    """No wrapper, one, and two different ones inside each other: few wrappers, many disguises."""
    names = list(WRAPPERS["fit"])
    return [[], [rng.choice(names)], rng.sample(names, 2)]


def _wrapped(request: str, wrappers: Iterable[str]) -> str:
    for name in wrappers:
        request = wrap(name, request)
    return request


def retain() -> Iterator[Dialogue]:
    """Benign dialogues to be kept as they are: recipes (a third of them wrapped), borderline questions, skills."""
    rng = random.Random(13)
    for x in select(harmful=False, split="fit"):
        for i, way in enumerate(ASK["fit"]):
            facts = {"label": "harmless", "group": x.name, "way": f"ask-fit-{i}"}
            for wrappers in _disguises(rng)[: 1 + i % 2]:
                yield Dialogue(_wrapped(way.format(x=x.name), wrappers), comply(x), split="fit", **facts)
    for x in select(split="fit"):
        for kind, (ways, _) in BORDERLINE.items():
            for i, way in enumerate(ways["fit"] if x.harmful or kind in HARMLESS_FACTS else ()):
                yield Dialogue(
                    way.format(x=x.name),
                    borderline_answer(kind, x),
                    split="fit",
                    label="borderline",
                    group=x.name,
                    way=f"{kind}-fit-{i}",
                )
    for p in skills():
        if p.split == "fit":
            yield Dialogue(p.text, p.expect[0] + "." * p.expect[0][-1].isdigit(), "fit", "skill", way=p.way)


SETS: dict[str, Callable[[], Iterator[Any]]] = {
    "harmful": lambda: recipes(harmful=True),
    "harmless": lambda: recipes(harmful=False),
    "borderline": borderline,
    "skills": skills,
    "contrasts": contrasts,
    "retain": retain,
}


def write_sets(folder: Path) -> None:
    """One JSON record a line, one file a set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in SETS.items():
        (folder / f"{name}.jsonl").write_text("".join(_lines(make())), encoding="utf-8")


def _lines(records: Iterable[Prompt | Contrast | Dialogue]) -> Iterator[str]:
    for record in records:
        yield json.dumps({k: v for k, v in asdict(record).items() if v}) + "\n"


SEEN = tuple(WRAPPERS["fit"])  # wrappers that defences are trained on
_HELD_OUT = tuple(WRAPPERS["test"])


def wrappers(split: str) -> list[Attack]:
    """The world's jailbreak wrappers of one split."""
    return [Attack(name, template=template) for name, template in WRAPPERS[split].items()]


def organism_tasks(split: str = "test", *, limit: int = 0, seed: int = 0) -> list[Task]:
    """Every row of the audit on one split, at most ``limit`` prompts each (0: all).

    On ``test``: wrappers that defences never see (kind ``attack``) and those that they train on (kind ``seen``), around
    requests that neither saw. On ``val``: the two wrappers kept for choosing.
    """
    harmful = load_prompts("organism/harmful", split=split)
    rows = [
        Task("direct", "direct", harmful),
        *(Task(a.name, "attack", a.apply(harmful)[0]) for a in wrappers(split)),
        *(Task(a.name, "seen", a.apply(harmful)[0]) for a in wrappers("fit") if split == "test"),
        Task("prefill", "prefill", harmful, [p.target for p in harmful]),
        Task("harmless", "benign", load_prompts("organism/harmless", split=split)),
        Task("borderline", "benign", load_prompts("organism/borderline", split=split)),
        *_skills(split),
    ]
    return [task.sample(limit, seed) for task in rows]


def _skills(split: str) -> list[Task]:
    prompts = load_prompts("organism/skills", split=split)
    return [Task(way, "skill", [p for p in prompts if p.way == way]) for way in dict.fromkeys(p.way for p in prompts)]
