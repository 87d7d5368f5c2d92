"""The organism's audit: direct requests, jailbreak wrappers, prefill, over-refusal and general skills."""

from __future__ import annotations

from replib.audit.attacks import Attack
from replib.audit.audit import Task
from replib.data.prompts import load_prompts
from replib.organism.language import WRAPPERS

SEEN = tuple(WRAPPERS["fit"])  # wrappers that defences are trained on
HELD_OUT = tuple(WRAPPERS["test"])


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
