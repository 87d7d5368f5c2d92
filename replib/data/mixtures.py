"""The papers' training mixes, from public sets or from the organism, for RepBend and the other defences.

Nothing here may train on what is reported: give the evaluation prompts as ``avoid``, and rows with the same prompt
are left out and counted. Whole prompts are compared: a prompt wrapped in a jailbreak counts as another one.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from replib.core.errors import ReplibError
from replib.data.prompts import Contrast, Dialogue, Prompt, load_contrasts, load_dialogues
from replib.data.public import RowSource
from replib.data.training_sets import (
    FilterPipeline,
    Provenance,
    Subset,
    circuit_breakers,
    evaluated,
    pair,
    ultrachat,
    wildguardmix,
    wildjailbreak_pairs,
    wildjailbreak_safe,
    xstest_compliances,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BendData:
    """Training data of RepBend: harmful prompts with both answers, and dialogues to retain."""

    contrasts: Sequence[Contrast]
    """P_us: read with the safe response."""
    retain: Sequence[Dialogue]
    """P_s: benign dialogues, in the KL and (unless the fidelity is "official") in the safe term."""
    complied: Sequence[Contrast] = ()
    """P_uu: read with either response. () takes the contrasts themselves, in pairs."""
    safe: Sequence[Dialogue] = ()
    """Unpaired safe answers, refusals (``label`` harmful) and others: in the safe term, in the KL as refusals are."""
    unsafe: Sequence[Dialogue] = ()
    """Unpaired unsafe answers."""
    builds: tuple[Provenance, ...] = ()
    """How the groups came about, where ``replib.data.mixtures`` made them."""

    def __post_init__(self) -> None:
        if not self.contrasts or not self.retain:
            raise ReplibError("RepBend needs contrasts and dialogues to retain: one of the two lists is empty.")
        if bad := [
            c for c in (*self.contrasts, *self.complied) if not c.safe_response.strip() or not c.unsafe_response.strip()
        ]:
            raise ReplibError(f"{len(bad)} contrasts lack a safe or an unsafe response, for example to "
                              f"{bad[0].prompt[:60]!r}: fill or drop them.")  # fmt: skip


_PER_GROUP = 10_000
"""Rows of each group in both papers."""


@dataclass(frozen=True)
class DefenceData:
    """Training rows of the defences in ``replib.defences.catalogue``.

    Circuit Breaker and RMU need ``retain`` and ``unsafe``, NPO and WHP ``unsafe`` (and their retain list), SFT
    ``safe``, DPO ``pairs``, task arithmetic ``safe`` and ``unsafe``.
    """

    retain: Sequence[Dialogue]
    """Answers that stay as they are."""
    unsafe: Sequence[Dialogue]
    """Harmful answers, to be moved away from."""
    safe: Sequence[Dialogue] = ()
    """Answers to learn: refusals of harmful prompts and good answers to harmless ones."""
    pairs: Sequence[Contrast] = ()
    """Prompts with both answers."""
    builds: tuple[Provenance, ...] = ()


def repbend_mix(
    *,
    source: str = "public",
    wildjailbreak: RowSource | None = None,
    answers: str | Path | None = None,
    wildguard: RowSource | None = "allenai/wildguardmix",
    chat: RowSource | None = "HuggingFaceH4/ultrachat_200k",
    n: int | None = _PER_GROUP,
    seed: int = 0,
    avoid: Iterable[str | Prompt] = (),
) -> BendData:
    """RepBend's mix, n of each group or all there are: WildJailbreak pairs, WildGuardMix safe and unsafe, UltraChat.

    ``wildjailbreak`` is RepBend's own ``wildjailbreak.jsonl``. With ``answers``, a dialogue file of unsafe answers to
    vanilla prompts, it is the public training set instead, whose refusals ``pair`` joins with them.

    ``builds`` of the result counts the rows left by every filter; ``train`` writes it beside the adapter. The authors
    take the first n of each file and one dialogue more; here all groups are drawn (``replib.data.training_sets``).

    ``source="organism"`` reads the shipped sets instead, fit split: direct requests are the pairs, wrapped ones the
    unpaired unsafe answers and refusals; one half of the benign recipes and questions stands on the safe side, the
    other half and all skills are retained.

    Raises:
        ReplibError: as the builders; a ``source`` that is neither.
    """
    shared: dict[str, Any] = {"n": n, "seed": seed, "avoid": evaluated(avoid)}
    if _is_organism(source):
        groups = _organism_bend(shared)
    else:
        groups = {
            "contrasts": _paired(wildjailbreak, answers, shared)
            if answers
            else wildjailbreak_pairs(wildjailbreak, **shared),
            "retain": ultrachat("train_sft", chat, **shared),
            "safe": wildguardmix("safe", wildguard, **shared),
            "unsafe": wildguardmix("unsafe", wildguard, **shared),
        }
    rows: dict[str, Any] = {name: built.rows for name, built in groups.items()}
    return BendData(**rows, builds=tuple(built.build for built in groups.values()))


def _paired(wildjailbreak: RowSource | None, answers: str | Path, shared: dict[str, Any]) -> Subset:
    """Refusals of the public WildJailbreak beside unsafe answers of your own."""
    safe = wildjailbreak_safe(wildjailbreak or "allenai/wildjailbreak", **shared | {"n": None})
    rows = pair(safe.rows, load_dialogues(answers))
    source = f"{safe.build.source}, unsafe answers of {Path(answers).name}"
    return FilterPipeline("wildjailbreak pairs", source, rows).built(**shared)


def circuit_breaker_mix(
    *,
    source: str = "public",
    breakers: RowSource | None = None,
    chat: RowSource | None = "HuggingFaceH4/ultrachat_200k",
    xstest: RowSource | None = None,
    n: int | None = _PER_GROUP,
    refusals: int = 2000,
    seed: int = 0,
    avoid: Iterable[str | Prompt] = (),
) -> DefenceData:
    """Circuit Breaker's mix: harmful answers of ``breakers`` (circuit_breakers_train.json) against what is retained.

    Retained are UltraChat's test_sft, the XSTest prompts that GPT-4 answered in full, 50 times each, and ``refusals``
    of the same file twice each, which the authors add for Llama alone (0 leaves them out). For Llama they also empty
    the prompt of every second row; that is left out, since a chat with an empty turn is no chat. ``pairs`` has the
    prompts with a refusal and a harmful answer.

    **Circuit Breaker trains on XSTest prompts: the XSTest score of a model trained with ``xstest`` is contaminated.**
    Without it (the default) that score may be reported, but the mix is not the paper's.

    ``source="organism"`` reads the shipped sets instead, fit split: all contrasts, borderline questions in the place
    of XSTest (once each, they are plenty), the other benign dialogues in that of UltraChat.

    Raises:
        ReplibError: as the builders; a ``source`` that is neither; ``refusals`` is negative.
    """
    if refusals < 0:
        raise ReplibError(f"refusals={refusals} must not be negative; 0 leaves them out.")
    shared: dict[str, Any] = {"n": n, "seed": seed, "avoid": evaluated(avoid)}
    few = shared | {"n": refusals}
    if _is_organism(source):
        unsafe, retained, safe = _organism_breaker(shared, few)
    else:
        unsafe = circuit_breakers(breakers, **shared)
        retained = [ultrachat("test_sft", chat, **shared), *_borderline(xstest, shared)]
        safe = [circuit_breakers(breakers, side="safe", **few)] if refusals else []
    kept = [*retained, *(_repeated(built, 2) for built in safe)]
    return DefenceData(
        retain=_shuffled([row for built in kept for row in built.rows * built.build.times], seed),
        unsafe=unsafe.rows,
        safe=[row for built in safe for row in built.rows],
        pairs=pair((row for built in safe for row in built.rows), unsafe.rows),
        builds=(unsafe.build, *(built.build for built in kept)),
    )


def defence_data(bend: BendData, *, benign: float = 0.0, seed: int = 0) -> DefenceData:
    """RepBend's mix as the other defences read it, so that all of them train on the same rows.

    Safe and unsafe are both sides of the contrasts and the unpaired answers, as in RepBend's own comparison.

    Args:
        bend: RepBend's mix.
        benign: retained answers to draw into ``safe``, for each row there. Whoever learns nothing but refusals refuses
            everything; in the papers' sets half of the safe answers are to harmless requests.
        seed: of that draw.
    """
    both = [*bend.contrasts, *bend.complied]
    label = {"split": "fit", "label": "harmful"}
    safe = [*(Dialogue(c.prompt, c.safe_response, **label) for c in both), *bend.safe]
    drawn = random.Random(seed).sample(bend.retain, min(len(bend.retain), round(benign * len(safe))))
    return DefenceData(
        retain=bend.retain,
        unsafe=[*(Dialogue(c.prompt, c.unsafe_response, **label) for c in both), *bend.unsafe],
        safe=[*safe, *drawn],
        pairs=both,
        builds=bend.builds,
    )


def builds_table(data: BendData | DefenceData) -> pd.DataFrame:
    """One row a group. Columns: name, source, rows (of the source), asked, n, times, seed, hash."""
    columns = ["name", "source", "rows", "asked", "n", "times", "seed", "hash"]
    return pd.DataFrame([asdict(b) | {"rows": b.steps[0][1]} for b in data.builds], columns=columns)


def _is_organism(source: str) -> bool:
    if source not in ("public", "organism"):
        raise ReplibError(f"source is 'public' or 'organism', not {source!r}; files have their own arguments.")
    return source == "organism"


def _borderline(xstest: RowSource | None, shared: dict[str, Any]) -> list[Subset]:
    """XSTest's answered prompts, 50 times each, with a word on what they do to its score."""
    if xstest is None:
        log.warning("circuit_breaker_mix without xstest: XSTest may be reported, but the mix is not the paper's")
        return []
    log.warning("circuit_breaker_mix trains on XSTest prompts: do not report the XSTest score of what comes out")
    return [_repeated(xstest_compliances(xstest, **shared), 50)]


def _repeated(built: Subset, times: int) -> Subset:
    return Subset(built.rows, replace(built.build, times=times))


def _shuffled(rows: list[Dialogue], seed: int) -> list[Dialogue]:
    """The groups mixed, copies of a row apart; the same on every machine."""
    draws = [hashlib.sha256(f"{seed}\n{i}\n{row.prompt}".encode()).digest() for i, row in enumerate(rows)]
    return [rows[i] for i in sorted(range(len(rows)), key=draws.__getitem__)]


def _organism(name: str, rows: Iterable[Any], shared: dict[str, Any]) -> Subset:
    return FilterPipeline(f"organism {name}", "organism, fit", rows).built(**shared)


def _organism_bend(shared: dict[str, Any]) -> dict[str, Subset]:
    contrasts = load_contrasts("organism/contrasts", split="fit")
    wrapped = [c for c in contrasts if c.wrapper]
    safe, retain = _halves(load_dialogues("organism/retain", split="fit"))
    return {
        "contrasts": _organism("pairs", (c for c in contrasts if not c.wrapper), shared),
        "retain": _organism("retain", retain, shared),
        "safe": _organism("safe", [*(_side(c, c.safe_response) for c in wrapped), *safe], shared),
        "unsafe": _organism("unsafe", (_side(c, c.unsafe_response) for c in wrapped), shared),
    }


def _halves(benign: list[Dialogue]) -> tuple[list[Dialogue], list[Dialogue]]:
    """Half of the recipes and questions; the other half and all skills. Which half hangs on the text alone."""
    first = {d for d in benign if d.label != "skill" and hashlib.sha256(d.prompt.encode()).digest()[0] % 2}
    return [d for d in benign if d in first], [d for d in benign if d not in first]


def _organism_breaker(shared: dict[str, Any], few: dict[str, Any]) -> tuple[Subset, list[Subset], list[Subset]]:
    contrasts = load_contrasts("organism/contrasts", split="fit")
    benign = load_dialogues("organism/retain", split="fit")
    retained = [
        _organism("chat", (d for d in benign if d.label != "borderline"), shared),
        _organism("borderline", (d for d in benign if d.label == "borderline"), shared),
    ]
    safe = [_organism("refusals", (_side(c, c.safe_response) for c in contrasts), few)] if few["n"] else []
    return _organism("unsafe", (_side(c, c.unsafe_response) for c in contrasts), shared), retained, safe


def _side(c: Contrast, response: str) -> Dialogue:
    """One side of a contrast."""
    return Dialogue(c.prompt, response, c.split, "harmful", c.group, c.way)


_HOLDS = {
    "retain": "answers that stay as they are",
    "unsafe": "harmful answers",
    "safe": "answers to learn, refusals among them",
    "pairs": "prompts with a safe and an unsafe answer each",
}
"""What each list of ``DefenceData`` is for, as messages say it."""


def check_lists(method: str, data: Any, *names: str) -> None:
    """Raise ReplibError unless the data has these lists, none is empty and no answer in them is."""
    if not isinstance(data, DefenceData):
        raise ReplibError(f"{method} trains on mixtures.DefenceData, not on {type(data).__name__}: "
                          "mixtures.defence_data(...) makes it from RepBend's.")  # fmt: skip
    for name in names:
        rows: Sequence[Any] = getattr(data, name)
        if not rows:
            raise ReplibError(f"{method} trains on `{name}` ({_HOLDS[name]}), which is empty: give DefenceData("
                              f"{name}=[...]), or make it with mixtures.defence_data(repbend_mix(...)).")  # fmt: skip
        answers = ("safe_response", "unsafe_response") if name == "pairs" else ("response",)
        if empty := sum(not all(getattr(row, answer).strip() for answer in answers) for row in rows):
            raise ReplibError(f"{empty} of {len(rows)} rows of `{name}` lack an answer, which {method} would teach: "
                              "fill or drop them.")  # fmt: skip
