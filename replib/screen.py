"""A cheap score of an edit, before any answer is written: the log-odds of refusal at the first token of the answer.

Edits are ranked by how many prompts they turn (``ranking.ordered``). The score exists only where that token tells
refusals from answers, which the model's own answers decide; ``agreement`` says how well it then ranks edits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from replib.core.errors import ReplibError
from replib.core.stats import crossed, spearman
from replib.models.chat_model import ChatModel
from replib.ranking import ordered
from replib.refusals import RefusalTokens

log = logging.getLogger(__name__)


WANTED = 0.9  # share of the refusals that the tokens must cover
SCORE = ("log_odds", "log_odds_low", "log_odds_high", "turned", "each", "coverage", "overlap")
LATER = ("response", "decode")  # edits there leave the first token of the answer as it is


@dataclass(frozen=True)
class Screen:
    """Tokens that a model's refusals begin with; None where the first token says too little."""

    tokens: RefusalTokens | None

    @classmethod
    def find(cls, model: ChatModel, harmful: Sequence[str], harmless: Sequence[str]) -> Screen:
        """From the model's own answers to the prompts that fit; where there is none, why is logged as a warning."""
        try:
            tokens = RefusalTokens.find(model, harmful, harmless, wanted=WANTED)
        except ReplibError as error:
            log.warning("No cheap score, so every edit is judged by whole answers. %s", error)
            return cls(None)
        if tokens.coverage >= WANTED:
            return cls(tokens)
        log.warning(
            "No cheap score, so every edit is judged by whole answers. Only %.0f %% of %d refusals of %s begin with "
            "tokens that its answers do not begin with (%s): of the others the first token says nothing.",
            100 * tokens.coverage, tokens.n_refused, model.name, ", ".join(tokens.words),
        )  # fmt: skip
        return cls(None)

    def row(self, logits: Float[Tensor, "prompts vocab"], positions: str) -> dict[str, Any]:
        """Log-odds of refusal: of each prompt, their mean with its 95 % interval, the share below 0; and coverage."""
        if self.tokens is None or positions in LATER:
            return dict.fromkeys(SCORE)
        each = self.tokens.log_odds(logits).numpy()
        found = (float(each.mean()), *crossed(each[None]), float((each < 0).mean()), each.tolist())
        return dict(zip(SCORE, (*found, self.tokens.coverage, self.tokens.overlap), strict=True))


@dataclass(frozen=True)
class Agreement:
    """How well the cheap score ranks edits as attack success does."""

    rho: float
    """Spearman, over edits, of their places by cheap score with attack success; NaN where that is constant."""
    low: float
    """Of its 95 % interval for other prompts (bootstrap over prompts, percentiles); edits are as given."""
    high: float
    log_odds: float
    """Spearman of minus the mean log-odds, the score of arXiv 2406.11717, instead."""
    cells: int
    """Edits of which both are known."""
    prompts: int
    missed: float
    """Attack success of the best edit, less that of the best among the ``best`` that the cheap score puts first."""
    best: int

    def __str__(self) -> str:
        return (
            f"Spearman {self.rho:.2f} [{self.low:.2f}, {self.high:.2f}] of places by cheap score with attack success "
            f"({self.cells} edits, n = {self.prompts} prompts; of mean log-odds {self.log_odds:.2f}); "
            f"attack success that the {self.best} first by cheap score miss: {self.missed:.0%}"
        )


def agreement(table: pd.DataFrame, best: int = 8, *, draws: int = 200, seed: int = 0) -> Agreement:
    """Cheap score against attack success, over the rows of a sweep of which both are known.

    Where answers were generated for the best edits alone, the range is restricted and the correlation with it: to
    learn what the score is worth, generate all.

    Raises ReplibError where fewer than three edits have both.
    """
    known = table[table.log_odds.notna() & table.compliance.notna()]
    if len(known) < 3:
        raise ReplibError(f"{len(known)} edits have both a cheap score and answers, three are needed: generate more.")
    odds, kl = np.array([*known.each]), known.kl.to_numpy()
    complied = np.array([[x == "c" for x in text] for text in known.outcomes], float)
    n, rng = odds.shape[1], np.random.default_rng(seed)
    drawn = [spearman(-_places(odds[:, i], kl), complied[:, i].mean(1)) for i in rng.integers(n, size=(draws, n))]
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    places, success = _places(odds, kl), complied.mean(1)
    return Agreement(
        rho=spearman(-places, success),
        low=float(low),
        high=float(high),
        log_odds=spearman(-odds.mean(1), success),
        cells=len(odds),
        prompts=n,
        missed=float(success.max() - success[places < best].max()),
        best=best,
    )


def _places(odds: Float[np.ndarray, "cells prompts"], kl: Float[np.ndarray, " cells"]) -> Float[np.ndarray, " cells"]:
    """Of each edit by cheap score, from 0."""
    table = pd.DataFrame({"turned": (odds < 0).mean(1), "log_odds": odds.mean(1), "kl": kl})
    return ordered(table, "cheap").index.to_numpy().argsort().astype(float)
