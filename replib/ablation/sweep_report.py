"""Tables of a finished sweep: edits in pairs and over fits, and the agreement of the cheap score with answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from replib.ablation.damage import DamageMeter
from replib.ablation.fit import Cell, cells_of
from replib.ablation.sweep import Sweeper, best_of, ordered
from replib.core.errors import ReplibError
from replib.core.stats import (
    contrast,
    interval_text,
    outcome_matrix,
    percentile_interval,
    spearman,
    two_way_rate_interval,
)


def compare_edits(table: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Every two edits of a table, told apart by these columns, on the prompts that both were scored on.

    Several rows of one edit are its fits (``fit_seed``). p values are not corrected for the number of pairs.

    Raises:
        ReplibError: edits that were scored on other prompts, or fitted another number of times.
    """
    if table["scored"].nunique() > 1:
        raise ReplibError("These edits were scored on different prompts: pair edits of one sweep.")
    groups = {
        ", ".join(map(str, name)): outcome_matrix(list(rows.outcomes))
        for name, rows in table.groupby(list(by), sort=False, dropna=False)
    }
    if len({len(x) for x in groups.values()}) > 1:
        raise ReplibError(f"{', '.join(by)} tell edits apart that were fitted another number of times: add columns.")
    return pd.DataFrame(
        {"one": one, "other": other} | contrast(groups[one], groups[other]) for one, other in combinations(groups, 2)
    )


def over_fits(table: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Attack success of each edit over its fits: mean, and ``two_way_rate_interval`` over fits and prompts."""
    return pd.DataFrame(
        dict(zip(by, name, strict=True)) | _rate(outcome_matrix(list(rows.outcomes)).astype(float))
        for name, rows in table.groupby(list(by), sort=False, dropna=False)
    )


def _rate(complied: Float[np.ndarray, "fits prompts"]) -> dict[str, Any]:
    low, high = two_way_rate_interval(complied)
    each = complied.mean(1)
    about = {"fits": len(each), "n": complied.shape[1], "compliance": float(each.mean()), "low": low, "high": high}
    return about | {"least": float(each.min()), "most": float(each.max())}


@dataclass(frozen=True)
class Agreement:
    """Agreement of the cheap score with attack success in ranking edits."""

    rho: float
    """Spearman, over edits, of their places by cheap score with attack success; NaN where that is constant."""
    low: float
    """Lower end of its 95 % interval over prompts (percentile bootstrap), edits fixed."""
    high: float
    log_odds: float
    """Spearman of minus the mean log-odds, the score of arXiv 2406.11717, instead."""
    cells: int
    """Edits with both scores."""
    prompts: int
    missed: float
    """Attack success of the best edit, less that of the best among the ``best`` that the cheap score puts first."""
    best: int

    def __str__(self) -> str:
        rho = interval_text(self.rho, self.low, self.high, ".2f", " ")
        return (
            f"Spearman {rho} of places by cheap score with attack success "
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
    complied = outcome_matrix(list(known.outcomes)).astype(float)
    n, rng = odds.shape[1], np.random.default_rng(seed)
    drawn = [spearman(-_places(odds[:, i], kl), complied[:, i].mean(1)) for i in rng.integers(n, size=(draws, n))]
    low, high = percentile_interval(drawn)
    places, success = _places(odds, kl), complied.mean(1)
    return Agreement(
        rho=spearman(-places, success),
        low=low,
        high=high,
        log_odds=spearman(-odds.mean(1), success),
        cells=len(odds),
        prompts=n,
        missed=float(success.max() - success[places < best].max()),
        best=best,
    )


def _places(odds: Float[np.ndarray, "cells prompts"], kl: Float[np.ndarray, " cells"]) -> Float[np.ndarray, " cells"]:
    """Rank of each edit by cheap score, from 0."""
    table = pd.DataFrame({"turned": (odds < 0).mean(1), "log_odds": odds.mean(1), "kl": kl})
    return ordered(table, "cheap").index.to_numpy().argsort().astype(float)


@dataclass(frozen=True)
class SweepReport:
    """The tables of a finished sweep."""

    sweeper: Sweeper
    table: pd.DataFrame

    @cached_property
    def best(self) -> pd.DataFrame:
        """The best edit of each method and edited position, by attack success."""
        return best_of(self.table, "method", "positions")

    def tables(self, gauge: DamageMeter, fits: int) -> dict[str, pd.DataFrame]:
        """By name: ``sweep``, ``pairs``, ``damage``, and ``fits`` where there are to be any."""
        cells = cells_of(self.best)
        found = {"sweep": self.table.drop(columns="each"), "pairs": compare_edits(self.best, "method", "positions")}
        if fits:
            again = self.sweeper.over_fits(cells, range(fits))
            again = again.assign(layer=again["layers"].str[0])  # a selected direction has its own block in each fit
            names = [name for name in Cell._fields if name != "layers" and name in again]
            found["fits"] = over_fits(again, *names, "layer")
        return found | {"damage": self.sweeper.damage(cells, gauge)}

    def worth(self) -> str:
        """Agreement of the cheap score with attack success, and its limits where only some edits were answered."""
        try:
            found = f"Cheap score: {agreement(self.table)}."
        except ReplibError as error:
            return f"What the cheap score is worth is not known. {error}"
        answered, every = int(self.table.compliance.notna().sum()), len(self.table)
        cut = f" Of {every} edits only these {answered} were answered, chosen by that score, so their range is cut."
        return found if answered == every else f"{found}{cut} Raise best to check the others."
