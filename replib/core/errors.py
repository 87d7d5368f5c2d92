"""Exceptions of the package and the checks of arguments that raise them."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence


class ReplibError(ValueError):
    """An error that the user can repair; its message names the thing, the reason and the repair."""


class Diverged(ReplibError):
    """Training ended in a loss that is not finite; a search may go on with other coefficients."""


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise ReplibError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ReplibError(f"{name}={value!r} is unknown: use one of {', '.join(choices)}.")


def check_coefficients(**values: float) -> None:
    """Raise ReplibError unless each is a finite number, zero or more."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ReplibError(f"{name}={value} must be a finite number, zero or more.")


def check_positive(**values: float) -> None:
    """Raise ReplibError unless each is a finite number above zero."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ReplibError(f"{name}={value} must be a finite number above zero.")


def check_blocks(blocks: Sequence[int], depth: int) -> None:
    """Raise ReplibError unless each index lies in 0 … depth - 1."""
    if bad := [i for i in blocks if not 0 <= i < depth]:
        raise ReplibError(f"Layer {bad[0]} is outside the model's blocks 0 to {depth - 1}.")
