"""What a sweep leaves: every edit, and of the best of each method its fits, its rivals, its damage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from replib.ablation import Sweeper
from replib.cells import Cell, cells_of
from replib.core.errors import ReplibError
from replib.damage import Gauge
from replib.paired import compare, over_fits
from replib.ranking import best_of
from replib.screen import agreement


@dataclass(frozen=True)
class SweepReport:
    """A sweep that is done."""

    sweeper: Sweeper
    table: pd.DataFrame

    @cached_property
    def best(self) -> pd.DataFrame:
        """The best edit of each method and edited position, by attack success."""
        return best_of(self.table, "method", "positions")

    def tables(self, gauge: Gauge, fits: int) -> dict[str, pd.DataFrame]:
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
