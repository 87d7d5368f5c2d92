"""Reader of the recorded comparison: rates with intervals, differences to RepBend, one table.

Every run is audited on the same test prompts. A rate is the mean of a matrix, seeds by prompts: 1 where an answer
complied (or was degenerate), or the share of several attacks on the same request that succeeded. Intervals of rates
and of differences are ``core.stats.two_way_interval``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Float

from replib.core.stats import Measured, interval_text, outcome_matrix, two_way_interval, two_way_rate_interval
from replib.organism.recorded import read_recorded

HARMFUL_KINDS = (
    "direct",
    "attack",
    "seen",
    "prefill",
    "edit",
)  # kinds of tasks that ask for the same things in several ways
MEASURES = {
    "attack": "mean attack success",
    "direct": "direct requests",
    "seen": "wrappers of training",
    "prefill": "prefill",
    "harmless": "harmless",
    "borderline": "borderline",
    "benign": "harmless and borderline",
    "skill": "skills",
    "degenerate": "degenerate, benign",
    "garbled": "degenerate, harmful",
}
"""Reported measures besides each single attack: rates of compliance, and two of degenerate answers."""
_GOOD = ("harmless", "borderline", "benign", "skill")
"""Measures that ought to be high; all others ought to be low."""
Matrix = Float[np.ndarray, "seeds prompts"]
S = TypeVar("S", bound="DefenceComparison")


@dataclass(frozen=True)
class DefenceComparison:
    """The audits of all methods and seeds."""

    program: ClassVar[str] = "comparison"
    """Module of ``replib.experiments`` that packs the audits."""
    tasks: pd.DataFrame
    """One row a task: name, kind, n."""
    runs: pd.DataFrame
    """One row a run: method, title, seed, answers (task -> a letter an answer), seconds, parameters."""
    trials: pd.DataFrame
    """One row a point that was tried: method, trial, objective, learning_rate, score on validation prompts, seconds."""
    about: Mapping[str, Any]
    """Model, versions, and the points that validation chose."""

    @classmethod
    def load(cls: type[S], path: Path | None = None) -> S:
        """Read the recorded audits, or the file at ``path``; raises ReplibError as ``read_recorded``."""
        found = read_recorded(cls.program, path)
        tables = {name: pd.DataFrame(found.pop(name)) for name in ("tasks", "runs", "trials")}
        return cls(**tables, about=found)

    @property
    def methods(self) -> list[str]:
        """In the order of the table."""
        return list(self.runs.method.unique())

    @property
    def titles(self) -> list[str]:
        """Titles of the methods."""
        return list(self.runs.title.unique())

    @property
    def attacks(self) -> list[str]:
        """Held-out attacks, as the table calls them."""
        return [name.replace("_", " ") for name in self.tasks.name[self.tasks.kind == "attack"]]

    @cached_property
    def measures(self) -> dict[str, tuple[list[str], str]]:
        """Tasks and outcome that each measure counts; each attack is a measure too."""
        kinds = self.tasks.groupby("kind", sort=False)["name"].agg(list)
        bad, good = (
            [n for k in kinds.index if (k in HARMFUL_KINDS) is harmful for n in kinds[k]] for harmful in (True, False)
        )
        named = {name: ([name], "c") for name in self.tasks.name}
        kind = {name: (kinds[name], "c") for name in kinds.index}
        return named | kind | {"degenerate": (good, "d"), "garbled": (bad, "d")}

    def matrix(self, method: str, measure: str) -> Matrix:
        """Rates of one measure by seed and prompt; means over several attacks."""
        names, letter = self.measures[measure]
        runs = self.runs[self.runs.method == method].sort_values("seed")
        each = [outcome_matrix([answers[name] for answers in runs.answers], letter).astype(float) for name in names]
        kinds = set(self.tasks.kind[self.tasks.name.isin(names)])
        return np.mean(each, axis=0) if kinds <= set(HARMFUL_KINDS) else np.concatenate(each, axis=1)

    def gap(self, method: str, measure: str, other: str = "repbend") -> Matrix:
        """The difference to another method, seed by seed (a model that was not trained is held against every seed)."""
        seeds = [self.runs[self.runs.method == name].sort_values("seed").seed.to_numpy() for name in (method, other)]
        pair = [self.matrix(name, measure) for name in (method, other)]
        if min(map(len, pair)) > 1:
            pair = [m[np.isin(own, np.intersect1d(*seeds))] for m, own in zip(pair, seeds, strict=True)]
        return pair[0] - pair[1]

    def tidy(self, other: str = "repbend") -> pd.DataFrame:
        """One row a method and measure: seeds, prompts, value, low, high, and the gap to another method."""
        return pd.DataFrame(self._row(m, measure, other) for m in self.methods for measure in self.measures)

    def _row(self, method: str, measure: str, other: str) -> dict[str, Any]:
        values = self.matrix(method, measure)
        row = {"method": method, "measure": measure, "seeds": values.shape[0], "prompts": values.shape[1]}
        row |= dict(zip(("value", "low", "high"), (values.mean(), *two_way_rate_interval(values)), strict=True))
        if other not in self.methods:
            return row
        gap = self.gap(method, measure, other)
        return row | dict(zip(("gap", "gap_low", "gap_high"), (gap.mean(), *two_way_interval(gap)), strict=True))

    def beats(self, other: str = "repbend") -> pd.DataFrame:
        """Measures by which a method is better than another, 95 % intervals of the gap on one side of zero.

        One row each, as in ``tidy``: of so many one in forty would stand here by chance.
        """
        rows = self.tidy(other)
        wanted = rows.measure.isin({*self.tasks.name[~self.tasks.kind.isin(HARMFUL_KINDS)], *_GOOD})
        return rows[rows.gap_low.gt(0) & wanted | rows.gap_high.lt(0) & ~wanted].reset_index(drop=True)

    def wide(self) -> pd.DataFrame:
        """A row a method: each rate as ``value [low, high]`` in per cent, seconds of training, size of the adapter."""
        names = self.tasks.name[self.tasks.kind == "attack"]
        shown = {"attack": MEASURES["attack"], **dict(zip(names, self.attacks, strict=True))} | MEASURES
        return pd.DataFrame(
            [self._summary_row(m, shown) for m in self.methods], index=pd.Index(self.titles, name="defence")
        )

    def _summary_row(self, method: str, titles: Mapping[str, str]) -> dict[str, Any]:
        runs = self.runs[self.runs.method == method]
        cells = {title: self._cell(method, measure) for measure, title in titles.items()}
        return (
            {"seeds": len(runs)} | cells | {"seconds": round(runs.seconds.mean()), "parameters": runs.parameters.max()}
        )

    def _cell(self, method: str, measure: str) -> str:
        values = self.matrix(method, measure)
        low, high = two_way_rate_interval(values)
        return interval_text(100 * values.mean(), 100 * low, 100 * high)

    def measured(self, measure: str) -> Measured:
        """One measure of all methods, for a figure."""
        each = [self.matrix(method, measure) for method in self.methods]
        low, high = zip(*map(two_way_rate_interval, each), strict=True)
        return Measured([m.mean() for m in each], low=low, high=high, n=[m.size for m in each])
