"""Cells of a sweep: which edit is fitted where and on what, where it acts, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import pandas as pd

from replib.core.errors import ReplibError
from replib.edits.apply import POSITIONS
from replib.edits.methods import Method, method_of
from replib.fitting import AblationData, Recipe
from replib.models.chat_model import ChatModel, check_layers
from replib.models.tokens import Position, check_positions
from replib.transport.affine import check_strength

KS = (1, 2, 4, 8, 16)


class Cell(NamedTuple):
    """One edit of a sweep."""

    method: str
    layers: tuple[int, ...]
    k: int
    """Principal components; 0 where the method has none."""
    positions: str
    """Tokens that are edited."""
    strength: float = 1.0
    read: Position | None = None
    """Position whose activations fit it; None is the choice of the method's source."""

    @property
    def how(self) -> Method:
        """The method, with the position it is fitted at."""
        method = method_of(self.method)
        return method if self.read is None else replace(method, read=self.read)

    @property
    def recipe(self) -> Recipe:
        """What a ``Fitter`` needs."""
        return Recipe(self.how, self.layers, max(self.k, 1), self.positions, self.strength)


def cells_of(table: pd.DataFrame) -> list[Cell]:
    """The cells of a table's rows."""
    columns = [table[name] for name in Cell._fields]
    return [Cell(m, tuple(map(int, ls)), int(k), p, float(s), r) for m, ls, k, p, s, r in zip(*columns, strict=True)]


def grid(
    methods: str | Sequence[str],
    layers: Sequence[int],
    *,
    ks: Sequence[int] = (2,),
    positions: Sequence[str | None] = (None,),
    strengths: Sequence[float] = (1.0,),
    reads: Sequence[Position | None] = (None,),
) -> list[Cell]:
    """Every combination once, an edit of one block each; K where a method has one, None the choice of its source."""
    names = [methods] if isinstance(methods, str) else methods
    cells = [
        Cell(name, (layer,), k, where or how.positions, strength, read)
        for name, how in zip(names, map(method_of, names), strict=True)
        for where, read, strength, layer, k in product(positions, reads, strengths, layers, ks if how.ranked else [0])
    ]
    return list(dict.fromkeys(cells))


def checked(cells: Sequence[Cell], model: ChatModel, data: AblationData, *, extrapolate: bool = False) -> list[Cell]:
    """The same cells with layers from 0 upwards, before anything is paid for them.

    ``extrapolate`` allows strengths outside [0, 1], where an edit moves activations back or beyond its target.

    Raises:
        ReplibError: unknown method, positions or layer; K above the rank that the prompts give, or of a method that
            has none; a strength outside [0, 1]; several blocks for a method that acts at all of them.
    """
    most = min(len(data.harmful) - 1, len(data.harmless) - 1, model.d_model)
    for cell in cells:
        _check_method(cell, most)
        check_strength(cell.strength, "extrapolate=True goes beyond, finitely far", extrapolate=extrapolate)
    return [cell._replace(layers=tuple(sorted(set(check_layers(model, cell.layers))))) for cell in cells]


def check_names(
    methods: Sequence[str], positions: Sequence[str | None] = (), reads: Sequence[Position | None] = ()
) -> None:
    """Raise ReplibError for an unknown method, edited position or fit position; None is a method's own choice."""
    for method in methods:
        method_of(method)
    for place in positions:
        if place is not None and place not in POSITIONS:
            raise ReplibError(f"Unknown edit positions {place!r}: use one of {', '.join(POSITIONS)}.")
    if given := [read for read in reads if read is not None]:
        check_positions(given)


def _check_method(cell: Cell, most: int) -> None:
    method = cell.how
    check_names([cell.method], [cell.positions], [cell.read])
    if method.everywhere and len(cell.layers) > 1:
        raise ReplibError(f"{cell.method} acts at every block, wherever it was fitted: give it one block, not several.")
    if not method.ranked and cell.k:
        raise ReplibError(f"{cell.method} has no K, but {cell.k} was given: K = 0 says so.")
    if method.ranked and not 1 <= cell.k <= most:
        raise ReplibError(
            f"K = {cell.k} of {cell.method}: these prompts and this width fit 1 to {most} axes. "
            "Give more prompts of both classes, or a lower K."
        )


def possible_ks(model: ChatModel, data: AblationData) -> list[int]:
    """Those of 1, 2, 4, 8 and 16 that the prompts can fit."""
    return [k for k in KS if k < min(len(data.harmful), len(data.harmless), model.d_model)]


def window(depth: int) -> tuple[int, int] | None:
    """First and last block between 40 and 60 % of the depth, where arXiv 2603.04355 chose its blocks; None if none."""
    first, last = -(-2 * depth // 5), 3 * depth // 5
    return (first, last) if first <= last else None
