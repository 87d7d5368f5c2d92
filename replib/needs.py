"""What a defence must be given: lists that are filled, coefficients that are numbers, blocks that exist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from replib.core.errors import ReplibError
from replib.mixtures import DefenceData

HOLDS = {
    "retain": "answers that stay as they are",
    "unsafe": "harmful answers",
    "safe": "answers to learn, refusals among them",
    "pairs": "prompts with a safe and an unsafe answer each",
}
"""What each list of ``DefenceData`` is for, as messages say it."""


def check_lists(method: str, data: Any, *names: str) -> None:
    """Raise ReplibError unless the data has these lists, none is empty and no answer in them is."""
    if not isinstance(data, DefenceData):
        raise ReplibError(f"{method} trains on mixtures.DefenceData, not on {type(data).__name__}: "
                          "mixtures.defence_data(...) makes it from RepBend's.")  # fmt: skip
    for name in names:
        rows: Sequence[Any] = getattr(data, name)
        if not rows:
            raise ReplibError(f"{method} trains on `{name}` ({HOLDS[name]}), which is empty: give DefenceData("
                              f"{name}=[...]), or make it with mixtures.defence_data(repbend_mix(...)).")  # fmt: skip
        answers = ("safe_response", "unsafe_response") if name == "pairs" else ("response",)
        if empty := sum(not all(getattr(row, answer).strip() for answer in answers) for row in rows):
            raise ReplibError(f"{empty} of {len(rows)} rows of `{name}` lack an answer, which {method} would teach: "
                              "fill or drop them.")  # fmt: skip


def block_at(blocks_of_32: int, depth: int) -> int:
    """The block whose output lies as deep in a model as that of so many blocks does in one of 32."""
    return max(0, round(blocks_of_32 / 32 * depth) - 1)
