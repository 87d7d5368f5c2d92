"""Questions of the transport audit: same prompts for every subject, edits fitted on the subject itself.

Edits are fitted on prompts of ``fit``, blocks are chosen on ``val``, everything that is reported is asked on ``test``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from replib.ablation.edited_generation import strongest_block
from replib.ablation.fit import AblationData, Cell, grid
from replib.ablation.localisation import block_features, lens_profile
from replib.ablation.refusal_score import RefusalTokens
from replib.ablation.robustness import ANSWER_TOKENS, FLIP_STRENGTHS, least_strengths, token_edits, token_states
from replib.ablation.sweep import Sweeper
from replib.activations.capture import capture
from replib.analysis.profile import PARTS, layer_profile, relative_gaps
from replib.core.errors import ReplibError
from replib.core.stats import outcome_matrix
from replib.data.prompts import Dialogue, Prompt
from replib.edits.apply import Edited
from replib.edits.controls import variants
from replib.edits.methods import Method, fit_edit, pca_ot
from replib.models.chat_model import ChatModel
from replib.organism.language import comply
from replib.organism.world import select
from replib.study.study import Study

FIT, MOST, _PROFILED, CHOOSING, QUESTIONED = 128, 256, 96, 32, 48
"""Prompts a class: that fit an edit, that fits are drawn from, that a profile is made of, that choose, that report."""
_AUDIT_KS, _PERMUTATIONS = (2, 8), 100
SIZES, DRAWS = (2, 4, 8, 16, 32, 64, 128, 256), 3
DESIGN = {
    "fit": FIT,
    "profiled": _PROFILED,
    "val": CHOOSING,
    "test": QUESTIONED,
    "ks": _AUDIT_KS,
    "permutations": _PERMUTATIONS,
    "sizes": SIZES,
    "draws": DRAWS,
    "strengths": FLIP_STRENGTHS,
    "tokens": ANSWER_TOKENS,
}
_SampleRows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Examination:
    """One model under examination, beside the undefended one."""

    model: ChatModel
    study: Study
    undefended: Examination | None = None

    @cached_property
    def val(self) -> Sweeper:
        """Edits of this model, scored on the harmful prompts that choose."""
        return self._sweeper(self.study.harmful.val[:CHOOSING])

    @cached_property
    def test(self) -> Sweeper:
        """Edits of this model, scored on the harmful prompts that report."""
        return self._sweeper(self.study.harmful.test[:QUESTIONED])

    def _sweeper(self, scored: Sequence[Prompt]) -> Sweeper:
        harmful, harmless = ([p.text for p in prompts] for prompts in self.fit)
        data = AblationData(harmful, harmless, scored, harmless)
        return Sweeper(self.model, data, self.study.judge, max_new_tokens=40, batch_size=640)

    @property
    def fit(self) -> tuple[list[Prompt], list[Prompt]]:
        """Harmful and harmless prompts."""
        return self.study.harmful.fit[:FIT], self.study.harmless.fit[:FIT]

    def complying(self, label: int) -> list[Dialogue]:
        """The prompts of one class, each with its own recipe: what both classes are made to read."""
        answers = {x.name: comply(x) for x in select()}
        return [Dialogue(p.text, answers[p.group]) for p in self.fit[label]]

    @cached_property
    def states(self) -> tuple[Tensor, Tensor]:
        """Harmful and harmless fit prompts at their last token, ``[layers, n, d]`` each."""
        return self.read(self.study.harmful.fit, MOST), self.read(self.study.harmless.fit, MOST)

    def read(self, prompts: Sequence[Prompt], n: int, **options: Any) -> Tensor:
        """Activations of the first n prompts, at their last token unless options say otherwise."""
        return capture(self.model, [p.text for p in prompts[:n]], **options).values

    def at_prompt(
        self, method: str | Method, block: int, *, k: int = _AUDIT_KS[0], rows: _SampleRows | None = None
    ) -> Edited:
        """An edit of the last prompt token at one block, fitted on this model."""
        x, y = rows or (states[block][:FIT] for states in self.states)
        return {"last_prompt": fit_edit(method, x, y, block, k=k, depth=self.model.n_layers)}

    def by_block(
        self, method: str = "pca_ot", *, k: int = _AUDIT_KS[0], positions: str = "last_prompt", strength: float = 1.0
    ) -> list[Cell]:
        """One cell of each block."""
        blocks = range(self.model.n_layers)
        return grid(method, blocks, ks=[k], positions=[positions], strengths=[strength])

    @cached_property
    def tried(self) -> dict[int, list[str]]:
        """Outcomes of PCA-OT on the prompts that choose, by K and block."""
        return {k: self.val.outcomes(self.by_block(k=k)) for k in _AUDIT_KS}

    @cached_property
    def k(self) -> int:
        """Components with which the attack is strongest."""
        best = {k: texts[strongest_block(texts)] for k, texts in self.tried.items()}
        return _AUDIT_KS[strongest_block(list(best.values()), middle=0.0)]

    @property
    def block(self) -> int:
        """Block at which the attack is strongest, with ``k`` components."""
        return strongest_block(self.tried[self.k])

    @property
    def cells(self) -> list[Cell]:
        """PCA-OT at each block, with the chosen number of components."""
        return self.by_block(k=self.k)

    @cached_property
    def edits(self) -> list[Edited]:
        """The same, fitted, to be tried on other models."""
        return [{"last_prompt": self.val.fitted(cell)} for cell in self.cells]


def gaps(case: Examination) -> dict[str, Any]:
    """Transport gaps by block, at the last prompt token and over the same opening of an answer, forced on all."""
    classes = [x.test[:_PROFILED] for x in (case.study.harmful, case.study.harmless)]
    prompt = [case.read(x, _PROFILED) for x in classes]
    forced = [case.read(x, _PROFILED, responses=[p.target for p in x], positions="response") for x in classes]
    return {"prompt": _profile(*prompt), "answer": _profile(*forced)}


def _profile(x: Tensor, y: Tensor) -> dict[str, Any]:
    profile = layer_profile(x, y, permutations=_PERMUTATIONS)
    table = relative_gaps(profile)
    parts = {part: table[table.part == part] for part in PARTS}
    found = {part: {c: _short(own[c]) for c in ("value", "low", "high", "p")} for part, own in parts.items()}
    return found | {"auroc": _short(profile["auroc"])}


def blocks(case: Examination) -> dict[str, Any]:
    """Success by block of the re-fitted edit and of the undefended model's, and what is known of each block."""
    assert case.undefended
    table = relative_gaps(layer_profile(*(x[:, :FIT] for x in case.states), permutations=1))
    known = [_features(case, i, table) for i in range(case.model.n_layers)]
    return {
        "k": case.k,
        "block": case.block,
        "val": {str(k): [text.count("c") for text in texts] for k, texts in case.tried.items()},
        "plain": case.test.answers.outcomes([{}])[0],
        "refitted": case.test.outcomes(case.cells),
        "transferred": case.test.answers.outcomes(case.undefended.edits),
        "features": {name: _short([row[name] for row in known]) for name in known[0]},
    }


def _features(case: Examination, block: int, table: Any) -> dict[str, float]:
    own = [float(table.value[(table.layer == block) & (table.part == part)].iloc[0]) for part in PARTS]
    x, y = (states[block][:FIT] for states in case.states)
    return block_features(x, y, own, depth=block / (case.model.n_layers - 1), k=_AUDIT_KS[0])._asdict()


def strengths(case: Examination) -> dict[str, Any]:
    """The least strength that flips each prompt, where half of an edit does most; null where no strength does."""
    block = strongest_block(case.val.outcomes(case.by_block(k=case.k, strength=0.5)))
    scaled = [case.cells[block]._replace(strength=strength) for strength in FLIP_STRENGTHS]
    least = least_strengths(outcome_matrix(case.test.outcomes(scaled, extrapolate=True)))
    return {"block": block, "least": [None if np.isinf(s) else round(float(s), 3) for s in least]}


def samples(case: Examination) -> dict[str, Any]:
    """Success by number of fit prompts a class, each number drawn several times."""
    draw = torch.Generator().manual_seed(0)
    drawn = [[torch.randperm(MOST, generator=draw)[:n] for _ in range(2)] for n in SIZES for _ in range(DRAWS)]
    states = [x[case.block] for x in case.states]
    edits = [
        case.at_prompt("pca_ot", case.block, k=min(case.k, len(a) // 2), rows=(states[0][a], states[1][b]))
        for a, b in drawn
    ]
    found = case.test.answers.outcomes(edits)
    return {str(n): found[i * DRAWS : (i + 1) * DRAWS] for i, n in enumerate(SIZES)}


def shares(case: Examination) -> dict[str, Any]:
    """Success of the edit and of each of its nulls."""
    fits = [(name, fit) for name, some in variants(pca_ot, DRAWS).items() for fit in some]
    found = case.test.answers.outcomes([case.at_prompt(Method(fit, name), case.block, k=case.k) for name, fit in fits])
    names = [name for name, _ in fits]
    return {name: [text for n, text in zip(names, found, strict=True) if n == name] for name in dict.fromkeys(names)}


def tokens(case: Examination) -> dict[str, Any]:
    """Edits fitted at the prompt's end, at answer tokens and at both: by block on val, at the best block on test.

    Every second block is tried: fourteen kinds of edits, of long answers, cost most of all.
    """
    tried = range(1, case.model.n_layers, 2)
    harmful, harmless = (token_states(case.model, case.complying(label)) for label in (0, 1))
    edits = {name: [some[i] for i in tried] for name, some in token_edits(harmful, harmless, k=case.k).items()}
    found = iter(case.val.answers.outcomes([edit for some in edits.values() for edit in some]))
    val = {name: list(islice(found, len(tried))) for name in edits}
    best = {name: strongest_block(texts) for name, texts in val.items()}
    test = dict(zip(edits, case.test.answers.outcomes([edits[name][i] for name, i in best.items()]), strict=True))
    kinds = {
        name: {"val": [text.count("c") for text in val[name]], "block": tried[i], "test": test[name]}
        for name, i in best.items()
    }
    return {"blocks": list(tried), "kinds": kinds}


def places(case: Examination) -> dict[str, Any]:
    """Other estimates of the block that decides refusal: one direction by block, and the logit lens."""
    everywhere, shifts = case.by_block("rfa", positions="all"), case.by_block("actadd")
    return {"rfa": case.test.outcomes(everywhere), "actadd": case.test.outcomes(shifts), "lens": _lens(case)}


def _lens(case: Examination) -> list[float] | None:
    """Lens profile; absent if nothing is refused or first tokens of refusals and answers do not differ."""
    harmful, harmless = ([p.text for p in prompts] for prompts in case.fit)
    try:
        first = RefusalTokens.find(case.model, harmful, harmless)
    except ReplibError:
        return None
    return _short(lens_profile(case.model, case.states[0][:, :FIT], case.states[1][:, :FIT], first))


QUESTIONS: dict[str, tuple[Callable[[Examination], dict[str, Any]], float]] = {
    "gaps": (gaps, 4), "blocks": (blocks, 15), "strengths": (strengths, 8), "samples": (samples, 8),
    "shares": (shares, 8), "tokens": (tokens, 35), "places": (places, 15),
}  # fmt: skip
"""Each with the CPU seconds of a busy core that it takes."""


def answered(case: Examination, question: str) -> dict[str, Any]:
    """The answer to one question; a small K that misses the mean gap is part of it and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return QUESTIONS[question][0](case)


def _short(values: Any) -> list[float]:
    return [float(f"{x:.3g}") for x in np.asarray(values, float).tolist()]
