"""Edits of two blocks: a greedy search, every pair, and the shortfall of the search.

Blocks are fitted in the order of depth, the upper one with the lower one active, whichever was found first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from replib.ablation.fit import Cell
from replib.ablation.sweep import Sweeper, ordered
from replib.core.stats import contrast, outcome_matrix, two_way_interval
from replib.edits.methods import method_of
from replib.models.chat_model import check_layers


@dataclass(frozen=True)
class Search:
    """A search of block pairs, by one score."""

    sweeper: Sweeper
    method: str = "pca_ot"
    k: int = 2
    positions: str | None = None
    by: str = "cheap"
    """As for ``sweep.ordered``; only for ``compliance`` are answers generated."""
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
        """Blocks to search among, ascending."""
        model = self.sweeper.model
        return sorted(check_layers(model, range(model.n_layers) if self.layers is None else self.layers))

    def _scored(self, layers: list[tuple[int, ...]]) -> pd.DataFrame:
        """Rows of these edits, the best first; neighbours that share a lower block share its activations."""
        positions = self.positions or method_of(self.method).positions
        k = self.k if method_of(self.method).ranked else 0
        cells = [Cell(self.method, x, k, positions) for x in layers]
        return ordered(self.sweeper.table(cells, best=None if self.by == "compliance" else 0), self.by)


def shortfall(found: pd.Series, best: pd.Series, by: str = "cheap") -> dict[str, Any]:
    """Score of the optimum less that of the pair that a search found, on the same prompts, with its 95 % interval."""
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
