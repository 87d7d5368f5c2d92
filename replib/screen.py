"""A cheap score of an edit, before any answer is written: the log-odds of refusal at the first token of the answer.

It exists only where that token tells refusals from answers, which the model's own answers decide; ``agreement`` says
how well it then ranks edits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from replib.audit import crossed
from replib.chat import ChatModel
from replib.errors import ReplibError
from replib.fitting import AblationData
from replib.refusals import RefusalTokens

log = logging.getLogger(__name__)
WANTED = 0.9  # share of the refusals that the tokens must cover
LATER = ("response", "decode")  # edits there leave the first token of the answer as it is


@dataclass(frozen=True)
class Screen:
    """Tokens that a model's refusals begin with; None where the first token says too little."""

    tokens: RefusalTokens | None

    @classmethod
    def find(cls, model: ChatModel, data: AblationData) -> Screen:
        """From the model's own answers to the prompts that fit; where there is none, why is logged as a warning."""
        try:
            tokens = RefusalTokens.find(model, data.harmful, data.harmless, wanted=WANTED)
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
        """Mean log-odds of refusal with its 95 % interval over prompts, each prompt's, and what the tokens cover."""
        if self.tokens is None or positions in LATER:
            return dict.fromkeys(("log_odds", "log_odds_low", "log_odds_high", "each", "coverage", "overlap"))
        each = self.tokens.log_odds(logits).numpy()
        low, high = crossed(each[None])
        mean = {"log_odds": float(each.mean()), "log_odds_low": low, "log_odds_high": high, "each": each.tolist()}
        return mean | {"coverage": self.tokens.coverage, "overlap": self.tokens.overlap}


@dataclass(frozen=True)
class Agreement:
    """How well the cheap score ranks edits as attack success does."""

    rho: float
    """Spearman, over edits, of minus the log-odds with attack success; NaN where either is constant."""
    low: float
    """Of its 95 % interval for other prompts (bootstrap over prompts, percentiles); edits are as given."""
    high: float
    cells: int
    """Edits of which both are known."""
    prompts: int
    missed: float
    """Attack success of the best edit, less that of the best among the ``best`` that the cheap score puts first."""
    best: int

    def __str__(self) -> str:
        return (
            f"Spearman {self.rho:.2f} [{self.low:.2f}, {self.high:.2f}] between cheap score and attack success "
            f"({self.cells} edits, n = {self.prompts} prompts); "
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
    odds = np.array([*known.each])
    complied = np.array([[x == "c" for x in text] for text in known.outcomes], float)
    n, rng = odds.shape[1], np.random.default_rng(seed)
    drawn = [_spearman(odds[:, i], complied[:, i]) for i in rng.integers(n, size=(draws, n))]
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    success, first = complied.mean(1), odds.mean(1).argsort(kind="stable")[:best]
    missed = float(success.max() - success[first].max())
    return Agreement(_spearman(odds, complied), float(low), float(high), len(odds), n, missed, best)


def _spearman(odds: Float[np.ndarray, "cells prompts"], complied: Float[np.ndarray, "cells prompts"]) -> float:
    success, score = complied.mean(1), -odds.mean(1)
    varied = np.ptp(success) > 0 and np.ptp(score) > 0
    return float(spearmanr(score, success).statistic) if varied else float("nan")
