"""What of an edit's effect is the classes', the subspace's, the mean's, the covariance's: the edit beside its nulls."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jaxtyping import Float

from replib.controls import BY_CHANCE, CONTROLS, Fit
from replib.core.stats import crossed, crossed_rate

FULL = "full"


def variants(fit: Fit, draws: int = 3) -> dict[str, list[Fit]]:
    """The fit itself and each of its controls, those of chance with as many seeds as ``draws``."""
    seeds = [{"seed": i} for i in range(draws)]
    return {FULL: [fit]} | {
        name: [control(fit, **seed) for seed in (seeds if name in BY_CHANCE else [{}])]
        for name, control in CONTROLS.items()
    }


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
