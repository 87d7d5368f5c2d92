"""Cost of a sweep in passes and tokens, before it is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from replib.ablation.fit import Cell, checked
from replib.ablation.refusal_direction import selection_tokens
from replib.ablation.refusal_score import ANSWER
from replib.ablation.sweep import ANSWERS_STAGE, FIRST_STAGE, Sweeper
from replib.edits.methods import Method


@dataclass(frozen=True)
class SweepCost:
    """The cost of the cells that the store does not hold yet."""

    cells: int
    missing: int
    """Cells with a result to be computed."""
    passes: int
    """Each of as many cells as fit a batch."""
    read: int
    """Prompt tokens that the model reads, to fit and to score."""
    written: int
    """Tokens that the model writes at most, in its own answers that find refusal tokens and to the scored prompts.
    Where its refusals begin as its answers do, all cells are generated, and the sweep logs a warning."""

    def __str__(self) -> str:
        return (
            f"{self.cells} edits, {self.missing} of them to be scored in {self.passes} passes: "
            f"{self.read:,} tokens read, at most {self.written:,} written"
        )


def sweep_cost(sweeper: Sweeper, cells: Sequence[Cell], *, best: int | None = None) -> SweepCost:
    """The cost of ``sweeper.table(cells, best=best)``; nothing is run.

    Raises ReplibError as ``cells.checked``.
    """
    cells = checked(cells, sweeper.model, sweeper.data)
    shared = [(cells, (FIRST_STAGE, ANSWERS_STAGE))]
    apart = [(cells, (FIRST_STAGE,)), (_longest(sweeper, cells, best or 0), (ANSWERS_STAGE,))]
    passes = [found for part in (shared if best is None else apart) for found in sweeper.missing(*part)]
    missing = list(dict.fromkeys(cell for _, some in passes for cell in some))
    scored, neutral = sweeper.scored, sweeper.neutral
    lists = {asked: [scored, neutral] if FIRST_STAGE in asked else [scored] for asked, _ in passes}
    read = [len(some) * each.read(some[0].positions) for asked, some in passes for each in lists[asked]]
    written = sum(len(some) for asked, some in passes if ANSWERS_STAGE in asked) * len(scored.prompts) * scored.length
    screening = any(FIRST_STAGE in asked for asked, _ in passes)
    return SweepCost(
        cells=len(cells),
        missing=len(missing),
        passes=len(passes),
        read=sum(read) + _fitting(sweeper, missing),
        written=written + screening * sum(sweeper.data.counts().values()) * ANSWER,
    )


def _longest(sweeper: Sweeper, cells: Sequence[Cell], best: int) -> list[Cell]:
    """The cells whose answers will be generated; without cheap scores, the largest number that it can be."""
    if not sweeper.missing(cells, (FIRST_STAGE,)):
        return sweeper.shortlist(cells, best)
    chosen: list[Cell] = []
    taken: Counter[tuple[str | Method, str]] = Counter()
    for cell in sorted(cells, key=lambda cell: not sweeper.missing([cell], (ANSWERS_STAGE,))):  # unknown ones first
        group = cell.method, cell.positions
        taken[group] += 1
        chosen += [cell] if taken[group] <= best or not cell.screened else []
    return [cell for cell in cells if cell in set(chosen)]


def _fitting(sweeper: Sweeper, cells: Sequence[Cell]) -> int:
    """Tokens read to fit: all fit prompts once a place, once under each set of earlier edits, and selections."""
    data, fitted = sweeper.data, [cell for cell in cells if not cell.how.selected]
    places = {(cell.how.read, cell.how.site) for cell in fitted}
    active = {cell._replace(layers=cell.layers[:i]) for cell in fitted for i in range(1, len(cell.layers))}
    rows = sweeper.model.tokenize([*data.harmful, *data.harmless])
    selections = [c.layers for c in cells if c.how.selected]
    selecting = [selection_tokens(sweeper.model, data.harmful, data.harmless, layers) for layers in selections]
    return sum(map(len, rows)) * (len(places) + len(active)) + sum(selecting)
