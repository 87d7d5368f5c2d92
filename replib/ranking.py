"""Which edit of a sweep is best, by what it does or by its cheap score; where edits begin to work; how ranks agree."""

from __future__ import annotations

import pandas as pd

from replib.core.errors import ReplibError
from replib.localise import onset

ORDERS = ("compliance", "cheap", "log_odds")


def ordered(table: pd.DataFrame, by: str = "compliance") -> pd.DataFrame:
    """Rows from the best to the worst for the attacker; those of which it is not known are left out.

    Args:
        table: rows of a sweep.
        by: ``compliance``, attack success. ``cheap``, the share of prompts whose first token is likelier not to refuse;
            to push that further is no more success, and collapses other tokens. That order is ours. ``log_odds``, the
            mean of all log-odds, as arXiv 2406.11717 ranks directions. Of equals, the one with the least KL is better;
            where no prompt is turned, the one with the lower log-odds.

    Raises ReplibError for another order.
    """
    if by not in ORDERS:
        raise ReplibError(f"Edits are not ordered by {by!r}: use one of {', '.join(ORDERS)}.")
    known = table[table["turned" if by == "cheap" else by].notna()]
    if by == "cheap":
        keys = {"first": -known.turned, "then": known.kl.where(known.turned > 0, known.log_odds)}
    else:
        keys = {"first": known.log_odds if by == "log_odds" else -known.compliance, "then": known.kl}
    return known.loc[pd.DataFrame(keys).sort_values(["first", "then"], kind="stable").index]


def best_of(table: pd.DataFrame, *groups: str, by: str = "compliance") -> pd.DataFrame:
    """The row of each group with the highest attack success, of equals the one with the least KL; see ``ordered``."""
    return ordered(table, by).groupby(list(groups), sort=False, dropna=False).head(1)


def sweep_onset(table: pd.DataFrame, share: float = 0.5) -> int | None:
    """The first block at which attack success reaches ``share`` of its maximum over blocks: where refusal is decided.

    An edit of the last prompt token before the blocks that decide is overruled by them; after them it is final. None
    if no block succeeds more often than not.
    """
    by_layer = table.groupby("layer")["compliance"].max()
    found = onset(by_layer.to_numpy(float), share=share, least=0.5)
    return None if found is None else int(by_layer.index[found])
