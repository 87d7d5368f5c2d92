"""Edits on the same prompts against each other, and rates over several fits: differences with their intervals.

Outcomes are a letter an answer, as ``Sweeper.table`` keeps them: r(efusal), c(ompliance), d(egenerate).
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from replib.core.errors import ReplibError
from replib.core.stats import contrast, crossed_rate, letters


def compare(table: pd.DataFrame, *by: str) -> pd.DataFrame:
    """Every two edits of a table, told apart by these columns, on the prompts that both were scored on.

    Several rows of one edit are its fits (``fit_seed``). The p are not corrected for the number of pairs.

    Raises:
        ReplibError: edits that were scored on other prompts, or fitted another number of times.
    """
    if table["scored"].nunique() > 1:
        raise ReplibError("These edits were scored on different prompts: pair edits of one sweep.")
    groups = {
        ", ".join(map(str, name)): letters(list(rows.outcomes))
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
        dict(zip(by, name, strict=True)) | _rate(letters(list(rows.outcomes)).astype(float))
        for name, rows in table.groupby(list(by), sort=False, dropna=False)
    )


def _rate(complied: Float[np.ndarray, "fits prompts"]) -> dict[str, Any]:
    low, high = crossed_rate(complied)
    each = complied.mean(1)
    about = {"fits": len(each), "n": complied.shape[1], "compliance": float(each.mean()), "low": low, "high": high}
    return about | {"least": float(each.min()), "most": float(each.max())}
