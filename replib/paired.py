"""Edits on the same prompts against each other, and rates over several fits: differences with their intervals.

Outcomes are a letter an answer, as ``Sweeper.table`` keeps them: r(efusal), c(ompliance), d(egenerate).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy.stats import binomtest

from replib.audit import crossed, crossed_rate, wilson
from replib.errors import ReplibError


def mcnemar(one: Bool[np.ndarray, " prompts"], other: Bool[np.ndarray, " prompts"]) -> float:
    """Exact two-sided p of McNemar's test: of the prompts on which two differ, does one win more than half?

    1 where they never differ.
    """
    wins, losses = int((one & ~other).sum()), int((other & ~one).sum())
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def letters(outcomes: Sequence[str], outcome: str = "compliance") -> Bool[np.ndarray, "fits prompts"]:
    """Which answers had an outcome, a row a fit.

    Raises ReplibError where rows are of unlike length, or have no answers.
    """
    if not outcomes or len({len(text) for text in outcomes}) != 1 or not outcomes[0]:
        raise ReplibError("Edits can be paired on the same prompts alone, with answers to all of them: generate those.")
    return np.array([[letter == outcome[0] for letter in text] for text in outcomes])


def newcombe(one: Bool[np.ndarray, " prompts"], other: Bool[np.ndarray, " prompts"]) -> tuple[float, float]:
    """95 % interval of the difference of two paired rates: Newcombe's tenth method (Statist. Med. 17, 2635, 1998).

    Wilson intervals of both, joined by their correlation.
    """
    p, q, n = one.mean(), other.mean(), len(one)
    (low_p, high_p), (low_q, high_q) = (wilson(int(x.sum()), n) for x in (one, other))
    both, none = int((one & other).sum()), int((~one & ~other).sum())
    cross = both * none - int((one & ~other).sum()) * int((other & ~one).sum())
    shared = max(cross - n / 2, 0) if cross > 0 else cross
    spread = np.sqrt(p * (1 - p) * q * (1 - q)) * n**2
    phi = shared / spread if spread else 0.0
    down, up = (np.sqrt(a**2 - 2 * phi * a * b + b**2) for a, b in ((p - low_p, high_q - q), (high_p - p, q - low_q)))
    return float(p - q - down), float(p - q + up)


def contrast(one: Bool[np.ndarray, "fits prompts"], other: Bool[np.ndarray, "fits prompts"]) -> dict[str, Any]:
    """Difference of two rates on the same prompts, and of the same fits where there are several.

    Its interval is for other prompts (``newcombe``), of several fits for other fits too (``audit.crossed``). ``p`` is
    McNemar's, of one fit each alone.
    """
    gap = one.astype(float) - other.astype(float)
    low, high = crossed(gap)
    if len(gap) == 1 or low == high:  # where fits do not vary, they are no more prompts
        low, high = newcombe(one[0], other[0])
    only = {"only_one": int((one & ~other).sum()), "only_other": int((other & ~one).sum())}
    size = {"n": gap.shape[1], "fits": len(gap)}
    p = mcnemar(one[0], other[0]) if len(gap) == 1 else float("nan")
    return only | size | {"difference": float(gap.mean()), "low": low, "high": high, "p": p}


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
