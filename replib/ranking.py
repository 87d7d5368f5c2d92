"""Which edit of a sweep is best, by what it does or by its cheap score, and where in depth edits begin to work."""

from __future__ import annotations

import pandas as pd

from replib.errors import ReplibError

ORDERS = {"compliance": ("compliance", "kl"), "log_odds": ("log_odds", "kl")}


def ordered(table: pd.DataFrame, by: str = "compliance") -> pd.DataFrame:
    """Rows from the best to the worst for the attacker; of equals the one with least KL first.

    ``by``: attack success (``compliance``), or the cheap score (``log_odds`` of refusal, the less the better).
    """
    if by not in ORDERS:
        raise ReplibError(f"Edits are not ordered by {by!r}: use one of {', '.join(ORDERS)}.")
    known = table[table[by].notna()]
    return known.sort_values([*ORDERS[by]], ascending=[by == "log_odds", True], kind="stable")


def best_of(table: pd.DataFrame, *groups: str, by: str = "compliance") -> pd.DataFrame:
    """The row of each group with the highest attack success, of equals the one with the least KL; see ``ordered``."""
    return ordered(table, by).groupby(list(groups), sort=False, dropna=False).head(1)


def onset(table: pd.DataFrame, share: float = 0.5) -> int | None:
    """The first block at which attack success reaches ``share`` of its maximum over blocks: where refusal is decided.

    An edit of the last prompt token before the blocks that decide is overruled by them; after them it is final. None
    if no block succeeds more often than not.
    """
    by_layer = table.groupby("layer")["compliance"].max()
    if not by_layer.max() >= 0.5:
        return None
    return int(by_layer.index[(by_layer >= share * by_layer.max()).to_numpy().argmax()])
