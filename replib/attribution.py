"""What of an edit's effect is the classes', the subspace's, the mean's, the covariance's: the edit beside its nulls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from replib.audit import crossed, crossed_rate
from replib.controls import Fit, covariance_only, harmless_split, mean_only, random_labels, random_subspace
from replib.paired import letters

FULL = "full"


def variants(fit: Fit, draws: int = 3) -> dict[str, list[Fit]]:
    """The fit itself and each of its controls, those of chance with as many seeds as ``draws``."""
    seeds = range(draws)
    return {
        FULL: [fit],
        "mean_only": [mean_only(fit)],
        "covariance_only": [covariance_only(fit)],
        "random_subspace": [random_subspace(fit, seed=i) for i in seeds],
        "random_labels": [random_labels(fit, seed=i) for i in seeds],
        "harmless_split": [harmless_split(fit, seed=i) for i in seeds],
    }


def success(draws: Sequence[str]) -> Float[np.ndarray, " prompts"]:
    """Share of the draws of one variant under which each prompt was complied with, from a letter an answer."""
    return letters(draws).mean(0)


def attributed(rates: dict[str, Float[np.ndarray, "seeds prompts"]]) -> pd.DataFrame:
    """Success of each variant, and how much less it is than that of the full edit on the same prompts and seeds.

    Columns: variant, value, low, high, n, ``less``, ``less_low``, ``less_high``; intervals are ``audit.crossed``'s.
    """
    rows = []
    for name, values in rates.items():
        gap = rates[FULL] - values
        rate = values.mean(), *crossed_rate(values), values.size
        rows.append((name, *rate, gap.mean(), *crossed(gap)))
    return pd.DataFrame(rows, columns=["variant", "value", "low", "high", "n", "less", "less_low", "less_high"])
