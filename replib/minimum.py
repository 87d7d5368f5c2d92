"""The least strength at which an edit flips a prompt: a curve of robustness in place of one rate.

An edit of strength s moves activations the share s of their way along the displacement interpolation, at s² of the
cost; beyond 1 lies no geodesic any more. The least strength of each prompt, and the share of prompts that still hold
at each, are ours: no paper that we know of reports them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from replib.core.errors import ReplibError
from replib.core.stats import crossed_rate
from replib.edits.apply import Edited

STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5, 2.0)


def scaled(edit: Edited, strengths: Sequence[float] = STRENGTHS) -> list[Edited]:
    """The same edit at each strength, on each of its tokens; beyond 1 it overshoots.

    Raises ReplibError unless strengths rise from zero or above.
    """
    if not strengths or strengths[0] < 0 or np.any(np.diff(strengths) <= 0):
        raise ReplibError(f"Strengths {list(strengths)} must rise, from 0 or above: give each once, upwards.")
    return [{where: {place: e * s for place, e in edits.items()} for where, edits in edit.items()} for s in strengths]


def least_strengths(
    complied: Bool[np.ndarray, "strengths prompts"], strengths: Sequence[float] = STRENGTHS
) -> Float[np.ndarray, " prompts"]:
    """The smallest strength at which each prompt was complied with; inf where it never was."""
    return np.where(complied.any(0), np.array(strengths)[complied.argmax(0)], np.inf)


def holding(least: Float[np.ndarray, "seeds prompts"], strengths: Sequence[float] = STRENGTHS) -> pd.DataFrame:
    """Share of prompts that no strength up to each has flipped: strength, value, low, high, n.

    The interval is ``audit.crossed_rate``'s, for other trainings and other prompts.
    """
    rows = []
    for s in strengths:
        held = (least > s).astype(float)
        rows.append((s, held.mean(), *crossed_rate(held), held.size))
    return pd.DataFrame(rows, columns=["strength", "value", "low", "high", "n"])
