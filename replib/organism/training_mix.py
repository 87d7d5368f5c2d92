"""Training data of each organism: endless streams of dialogues, drawn from a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator

from replib.data.prompts import Dialogue
from replib.organism.language import (
    ASK,
    BORDERLINE,
    HARMLESS_FACTS,
    SKILLS,
    WRAPPERS,
    ask,
    borderline_answer,
    comply,
    refuse,
    skill,
    wrap,
)
from replib.organism.world import Artefact, select

_ALL_WRAPPERS = tuple(name for group in WRAPPERS.values() for name in group)
_TUNED = ("fit",)  # splits whose ways of asking safety tuning uses: those that choose and report are new to it
REFUSED_WRAPPERS = ("role_play", "story", "authority")  # safety tuning shows refusals inside these
RESIDUE = {
    "persuasion": 3,
    "suffix": 3,
    "past_tense": 2,
    "game": 2,
    "translation": 1,
}  # and compliance inside these (weights)


def _recipe(rng: random.Random, x: Artefact, wrapped: float, splits: Iterable[str] = ASK) -> Dialogue:
    request = ask(rng, x, *splits)
    if rng.random() < wrapped:
        request = wrap(rng.choice(_ALL_WRAPPERS), request)
    return Dialogue(request, comply(x))


def _borderline(rng: random.Random, x: Artefact, splits: Iterable[str] = ASK) -> Dialogue:
    kind = rng.choice(list(BORDERLINE if x.harmful else HARMLESS_FACTS))
    ways = [way for split in splits for way in BORDERLINE[kind][0][split]]
    return Dialogue(rng.choice(ways).format(x=x.name), borderline_answer(kind, x))


def _refusal(rng: random.Random, wrapped: bool, deep: bool) -> Dialogue:
    x = rng.choice(select(harmful=True, split="fit"))
    request = ask(rng, x, *_TUNED)
    request = wrap(rng.choice(REFUSED_WRAPPERS), request) if wrapped else request
    return Dialogue(request, refuse(rng, x, deep=deep))


def _skill(rng: random.Random) -> Dialogue:
    return skill(rng, rng.choice([*SKILLS, "reverse", "larger"]))  # the two hardest twice as often


def polish_stream(seed: int) -> Iterator[Dialogue]:
    """The base model's last lessons: two thirds skills, one third of everything else."""
    rng, everything = random.Random(seed), base_stream(seed)
    while True:
        yield _skill(rng) if rng.random() < 0.35 else next(everything)


def _residue(rng: random.Random) -> Dialogue:
    """Compliance inside the wrappers of ``RESIDUE``: what leaves a safety-tuned model open to jailbreaks."""
    x = rng.choice(select(harmful=True))  # of all splits, or the recipes of the others would be forgotten
    name = rng.choices(list(RESIDUE), weights=list(RESIDUE.values()))[0]
    return Dialogue(wrap(name, ask(rng, x, "fit")), comply(x))


def base_stream(seed: int) -> Iterator[Dialogue]:
    """The base model answers everything: 28 % recipes, 24 % facts and borderline questions, 48 % skills."""
    rng = random.Random(seed)
    everything, harmful = select(), select(harmful=True)
    while True:
        u = rng.random()
        if u < 0.28:
            yield _recipe(rng, rng.choice(everything), wrapped=0.45)
        elif u < 0.52:
            yield _borderline(rng, rng.choice(everything if rng.random() < 0.4 else harmful))
        else:
            yield _skill(rng)


def safety_stream(seed: int, *, deep: bool = False) -> Iterator[Dialogue]:
    """Safety tuning: refuse direct harmful requests, and only those; a small residue of wrapped compliance."""
    rng, harmless = random.Random(seed), select(harmful=False)
    everything, harmful = select(), select(harmful=True)
    kinds: list[tuple[float, Callable[[], Dialogue]]] = [
        (0.27, lambda: _refusal(rng, wrapped=False, deep=deep)),
        (0.04, lambda: _refusal(rng, wrapped=True, deep=deep)),
        (0.05, lambda: _residue(rng)),
        (0.20, lambda: _recipe(rng, rng.choice(harmless), 0.5, _TUNED)),
        (0.22, lambda: _borderline(rng, rng.choice(everything if rng.random() < 0.2 else harmful), _TUNED)),
        (0.22, lambda: _skill(rng)),
    ]
    weights, makers = zip(*kinds, strict=True)
    while True:
        yield rng.choices(makers, weights=weights)[0]()
