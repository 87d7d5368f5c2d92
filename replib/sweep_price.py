"""What a sweep will cost, said before it starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from replib.ablation import ANSWERS, FIRST, Sweeper
from replib.cells import Cell, checked
from replib.refusals import ANSWER
from replib.screen import LATER


@dataclass(frozen=True)
class SweepPrice:
    """The size of a sweep, as far as the store does not hold it."""

    cells: int
    missing: int
    """Cells of which something is not known that was asked for."""
    passes: int
    """Each of as many cells as fit a batch."""
    read: int
    """Tokens of prompts that the model reads: to fit and to score."""
    written: int
    """Tokens that it writes, at most: its own answers that tell refusals, and those to the scored prompts. If its
    refusals turn out to begin as its answers do, all cells are generated, and the sweep says so."""

    def __str__(self) -> str:
        return (
            f"{self.cells} edits, {self.missing} of them to be scored in {self.passes} passes: "
            f"{self.read:,} tokens read, at most {self.written:,} written"
        )


def sweep_price(sweeper: Sweeper, cells: Sequence[Cell], *, best: int | None = None) -> SweepPrice:
    """The price of ``sweeper.table(cells, best=best)``; nothing is run.

    Raises ReplibError as ``cells.checked``.
    """
    cells = checked(cells, sweeper.model, sweeper.data)
    shared = [(cells, (FIRST, ANSWERS))]
    apart = [(cells, (FIRST,)), (_longest(sweeper, cells, best or 0), (ANSWERS,))]
    passes = [found for part in (shared if best is None else apart) for found in sweeper.missing(*part)]
    missing = list(dict.fromkeys(cell for _, some in passes for cell in some))
    scored, neutral = sweeper.scored, sweeper.neutral
    lists = {asked: [scored, neutral] if FIRST in asked else [scored] for asked, _ in passes}
    read = [len(some) * each.read(some[0].positions) for asked, some in passes for each in lists[asked]]
    written = sum(len(some) for asked, some in passes if ANSWERS in asked) * len(scored.prompts) * scored.length
    screening = any(FIRST in asked for asked, _ in passes)
    return SweepPrice(
        cells=len(cells),
        missing=len(missing),
        passes=len(passes),
        read=sum(read) + _fitting(sweeper, missing),
        written=written + screening * sum(sweeper.data.counts().values()) * ANSWER,
    )


def _longest(sweeper: Sweeper, cells: Sequence[Cell], best: int) -> list[Cell]:
    """The cells that will be generated; where cheap scores are missing, as many as that can be, whichever these are."""
    if not sweeper.missing(cells, (FIRST,)):
        return sweeper.shortlist(cells, best)
    chosen: list[Cell] = []
    taken: Counter[tuple[str, str]] = Counter()
    for cell in sorted(cells, key=lambda cell: not sweeper.missing([cell], (ANSWERS,))):  # unknown ones first
        group = cell.method, cell.positions
        taken[group] += 1
        chosen += [cell] if taken[group] <= best or cell.positions in LATER else []
    return [cell for cell in cells if cell in set(chosen)]


def _fitting(sweeper: Sweeper, cells: Sequence[Cell]) -> int:
    """Tokens read to fit: all fit prompts once a place, and once more under each set of edits already in place."""
    places = {(cell.how.read, cell.how.site) for cell in cells}
    active = {cell._replace(layers=cell.layers[:i]) for cell in cells for i in range(1, len(cell.layers))}
    rows = sweeper.model.tokenize([*sweeper.data.harmful, *sweeper.data.harmless])
    return sum(map(len, rows)) * (len(places) + len(active))
