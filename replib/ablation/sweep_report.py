"""Edits of two blocks: a greedy search, every pair, and whether the first finds the optimum of the second.

Blocks are fitted in the order of depth, the upper one with the lower one active, whichever was found first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from replib.ablation.damage import DamageMeter
from replib.ablation.fit import Cell, cells_of, checked
from replib.ablation.refusal_score import ANSWER, LATER
from replib.ablation.sweep import ANSWERS, FIRST, Sweeper, best_of, ordered
from replib.core.errors import ReplibError
from replib.core.stats import (
    contrast,
    interval_text,
    outcome_matrix,
    percentile_interval,
    spearman,
    two_way_interval,
    two_way_rate_interval,
)
from replib.edits.methods import method_of
from replib.models.chat_model import check_layers


def compare(table: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Every two edits of a table, told apart by these columns, on the prompts that both were scored on.

    Several rows of one edit are its fits (``fit_seed``). The p are not corrected for the number of pairs.

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
    """Attack success of each edit over its fits: mean, and ``audit.crossed_rate``'s interval over fits and prompts."""
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
    """Of each edit by cheap score, from 0."""
    table = pd.DataFrame({"turned": (odds < 0).mean(1), "log_odds": odds.mean(1), "kl": kl})
    return ordered(table, "cheap").index.to_numpy().argsort().astype(float)


@dataclass(frozen=True)
class SweepCost:
    """The size of a sweep, as far as the store does not hold it."""

    cells: int
    missing: int
    """Cells of which something is not known that was asked for."""
    passes: int
    """Each of as many cells as fit a batch."""
    read: int
    """Tokens of prompts that the model reads: to fit and to score."""
    written: int
    """Tokens that it writes, at most: its own answers that tell refusals, and those to the scored prompts. If its
    refusals turn out to begin as its answers do, all cells are generated, and the sweep says so."""

    def __str__(self) -> str:
        return (
            f"{self.cells} edits, {self.missing} of them to be scored in {self.passes} passes: "
            f"{self.read:,} tokens read, at most {self.written:,} written"
        )


def sweep_cost(sweeper: Sweeper, cells: Sequence[Cell], *, best: int | None = None) -> SweepCost:
    """The price of ``sweeper.table(cells, best=best)``; nothing is run.

    Raises ReplibError as ``cells.checked``.
    """
    cells = checked(cells, sweeper.model, sweeper.data)
    shared = [(cells, (FIRST, ANSWERS))]
    apart = [(cells, (FIRST,)), (_longest(sweeper, cells, best or 0), (ANSWERS,))]
    passes = [found for part in (shared if best is None else apart) for found in sweeper.missing(*part)]
    missing = list(dict.fromkeys(cell for _, some in passes for cell in some))
    scored, neutral = sweeper.scored, sweeper.neutral
    lists = {asked: [scored, neutral] if FIRST in asked else [scored] for asked, _ in passes}
    read = [len(some) * each.read(some[0].positions) for asked, some in passes for each in lists[asked]]
    written = sum(len(some) for asked, some in passes if ANSWERS in asked) * len(scored.prompts) * scored.length
    screening = any(FIRST in asked for asked, _ in passes)
    return SweepCost(
        cells=len(cells),
        missing=len(missing),
        passes=len(passes),
        read=sum(read) + _fitting(sweeper, missing),
        written=written + screening * sum(sweeper.data.counts().values()) * ANSWER,
    )


def _longest(sweeper: Sweeper, cells: Sequence[Cell], best: int) -> list[Cell]:
    """The cells that will be generated; where cheap scores are missing, as many as that can be, whichever these are."""
    if not sweeper.missing(cells, (FIRST,)):
        return sweeper.shortlist(cells, best)
    chosen: list[Cell] = []
    taken: Counter[tuple[str, str]] = Counter()
    for cell in sorted(cells, key=lambda cell: not sweeper.missing([cell], (ANSWERS,))):  # unknown ones first
        group = cell.method, cell.positions
        taken[group] += 1
        chosen += [cell] if taken[group] <= best or cell.positions in LATER else []
    return [cell for cell in cells if cell in set(chosen)]


def _fitting(sweeper: Sweeper, cells: Sequence[Cell]) -> int:
    """Tokens read to fit: all fit prompts once a place, and once more under each set of edits already in place."""
    places = {(cell.how.read, cell.how.site) for cell in cells}
    active = {cell._replace(layers=cell.layers[:i]) for cell in cells for i in range(1, len(cell.layers))}
    rows = sweeper.model.tokenize([*sweeper.data.harmful, *sweeper.data.harmless])
    return sum(map(len, rows)) * (len(places) + len(active))


@dataclass(frozen=True)
class SweepReport:
    """A sweep that is done."""

    sweeper: Sweeper
    table: pd.DataFrame

    @cached_property
    def best(self) -> pd.DataFrame:
        """The best edit of each method and edited position, by attack success."""
        return best_of(self.table, "method", "positions")

    def tables(self, gauge: DamageMeter, fits: int) -> dict[str, pd.DataFrame]:
        """By name: ``sweep``, ``pairs``, ``damage``, and ``fits`` where there are to be any."""
        cells = cells_of(self.best)
        found = {"sweep": self.table.drop(columns="each"), "pairs": compare(self.best, "method", "positions")}
        if fits:
            again = self.sweeper.over_fits(cells, range(fits))
            found["fits"] = over_fits(again, *(name for name in Cell._fields if name != "layers"), "layer")
        return found | {"damage": self.sweeper.damage(cells, gauge)}

    def worth(self) -> str:
        """What the cheap score was worth here, and whether that can be told from the edits that were answered."""
        try:
            found = f"Cheap score: {agreement(self.table)}."
        except ReplibError as error:
            return f"What the cheap score is worth is not known. {error}"
        answered, every = int(self.table.compliance.notna().sum()), len(self.table)
        cut = f" Of {every} edits only these {answered} were answered, chosen by that very score, so their range is cut"
        return found if answered == every else f"{found}{cut} and what it misses is not seen: a larger best shows it."


@dataclass(frozen=True)
class Search:
    """What a search is made over, and what it calls best."""

    sweeper: Sweeper
    method: str = "pca_ot"
    k: int = 2
    positions: str | None = None
    by: str = "cheap"
    """As for ``ranking.ordered``; only for ``compliance`` are answers generated."""
    layers: Sequence[int] | None = None
    """Blocks to search among, default all."""

    def greedy(self) -> pd.DataFrame:
        """Every block alone, then the best one with every other: the rows that were scored, the best pair first.

        ``len(layers)`` tells the two steps apart.
        """
        alone = self._scored([(i,) for i in self.blocks])
        first = int(alone.layer.iloc[0])
        pairs = self._scored([tuple(sorted((first, i))) for i in self.blocks if i != first])
        return pd.concat([pairs, alone], ignore_index=True)

    def exhaustive(self) -> pd.DataFrame:
        """Every pair of blocks, the best first."""
        return self._scored([*combinations(self.blocks, 2)])

    @property
    def blocks(self) -> list[int]:
        """Those that are searched, ascending."""
        model = self.sweeper.model
        return sorted(check_layers(model, range(model.n_layers) if self.layers is None else self.layers))

    def _scored(self, layers: list[tuple[int, ...]]) -> pd.DataFrame:
        """Rows of these edits, the best first; neighbours that share a lower block share its activations."""
        positions = self.positions or method_of(self.method).positions
        k = self.k if method_of(self.method).ranked else 0
        cells = [Cell(self.method, x, k, positions) for x in layers]
        return ordered(self.sweeper.table(cells, best=None if self.by == "compliance" else 0), self.by)


def shortfall(found: pd.Series, best: pd.Series, by: str = "cheap") -> dict[str, Any]:
    """How much better the optimum is than what a search found, on the same prompts, with its 95 % interval."""
    if by == "log_odds":
        gap = np.array([found["each"]]) - np.array([best["each"]])
        return dict(zip(("shortfall", "low", "high"), (float(gap.mean()), *two_way_interval(gap)), strict=True))
    turned = [
        outcome_matrix([x["outcomes"]]) if by == "compliance" else np.array([x["each"]]) < 0 for x in (best, found)
    ]
    gap = contrast(*turned)
    return {"shortfall": gap["difference"], "low": gap["low"], "high": gap["high"]}


def greedy_against_all(search: Search) -> pd.Series:
    """Both searches in one line: the pairs, their scores, the greedy one's place among all, edits scored by each."""
    greedy, every = search.greedy(), search.exhaustive()
    found, best = greedy.iloc[0], every.iloc[0]
    places, score = [tuple(x) for x in every["layers"]], "turned" if search.by == "cheap" else search.by
    return pd.Series(
        {
            "model": found["model"],
            "by": search.by,
            "greedy": tuple(found["layers"]),
            "greedy score": found[score],
            "greedy kl": found["kl"],
            "best": tuple(best["layers"]),
            "best score": best[score],
            "best kl": best["kl"],
            "better pairs": places.index(tuple(found["layers"])),
            "pairs": len(places),
            "scored by greedy": len(greedy),
            "n": found["n"],
        }
        | shortfall(found, best, search.by)
    )
