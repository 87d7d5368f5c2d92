"""Sweeps of edits: a cheap score of every cell first, whole answers of the best, each cell scored the same way."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from replib.ablation.damage import DamageMeter, token_kl
from replib.ablation.edited_generation import EditedAnswers, EditedGeneration
from replib.ablation.fit import AblationData, Cell, Fitter, checked, grid, possible_ks
from replib.ablation.refusal_score import LATER, SCORE, FirstTokenScore
from replib.audit.audit import rates
from replib.audit.judges import Judge, encode_outcomes
from replib.core.errors import ReplibError
from replib.core.progress import progress
from replib.core.storage import Rows, key_of, versions
from replib.edits.apply import bound
from replib.edits.methods import SiteEdits
from replib.models.chat_model import ChatModel
from replib.models.tokens import Position

_ORDERS = ("compliance", "cheap", "log_odds")


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
    if by not in _ORDERS:
        raise ReplibError(f"Edits are not ordered by {by!r}: use one of {', '.join(_ORDERS)}.")
    known = table[table["turned" if by == "cheap" else by].notna()]
    if by == "cheap":
        keys = {"first": -known.turned, "then": known.kl.where(known.turned > 0, known.log_odds)}
    else:
        keys = {"first": known.log_odds if by == "log_odds" else -known.compliance, "then": known.kl}
    return known.loc[pd.DataFrame(keys).sort_values(["first", "then"], kind="stable").index]


def best_of(table: pd.DataFrame, *groups: str, by: str = "compliance") -> pd.DataFrame:
    """The row of each group with the highest attack success, of equals the one with the least KL; see ``ordered``."""
    return ordered(table, by).groupby(list(groups), sort=False, dropna=False).head(1)


FIRST_STAGE, ANSWERS_STAGE = "first token", "answers"  # what is known of a cell, each a row of the store
_NUMBER_COLUMNS = (
    "log_odds",
    "log_odds_low",
    "log_odds_high",
    "turned",
    "kl",
    "refusal",
    "compliance",
    "degenerate",
    "low",
    "high",
)
_NOT_MEASURED: dict[str, Any] = dict.fromkeys(_NUMBER_COLUMNS) | {"outcomes": ""}
_Stages = tuple[str, ...]


class Sweeper:
    """Scores edits of one model on one set of data, in a table that goes on where it stopped.

    Several edits share a pass of at most ``batch_size`` rows, each on its own copy of the prompts.
    """

    def __init__(
        self,
        model: ChatModel,
        data: AblationData,
        judge: Judge,
        *,
        name: str | None = None,
        store: Path | str | None = None,
        max_new_tokens: int = 24,
        batch_size: int = 128,
    ):
        self.model, self.data, self.judge = model, data, judge
        self.rows = Rows(store)
        self.answers = EditedAnswers(model, data.scored, judge, max_new_tokens, batch_size)
        self.prefilled = replace(self.answers, openings=data.openings)
        self.neutral = EditedGeneration(model, data.neutral, length=1, batch_size=batch_size)
        self.fitter = Fitter(model, data, range(model.n_layers), batch_size=batch_size, answer=max_new_tokens)
        self.about: dict[str, Any] = {"model": name or model.name, "judge": judge.name} | data.hashes()
        self.identity = model.provenance() | versions() | {"max_new_tokens": max_new_tokens}

    @cached_property
    def reference(self) -> Float[Tensor, "prompts vocab"]:
        """First-token logits of the unedited model on the neutral prompts."""
        return self.neutral.run([{}])[0][0]

    @cached_property
    def screen(self) -> FirstTokenScore:
        """The cheap score of this model, found once from its own answers."""
        return FirstTokenScore.find(self.model, self.data.harmful, self.data.harmless)

    def layers(
        self,
        method: str = "pca_ot",
        *,
        ks: Sequence[int] | None = None,
        layers: Sequence[int] | None = None,
        positions: str | None = None,
        strengths: Sequence[float] = (1.0,),
        read: Position | None = None,
        best: int | None = None,
    ) -> pd.DataFrame:
        """One edit at one block at a time, for every block, K and strength; see ``sweep_layers``.

        ``ks`` defaults to those of 1, 2, 4, 8 and 16 below the number of fit prompts of a class, ``positions`` and
        ``read`` to the choice of the method's source. ``rfa_selected`` is one cell, selected among the blocks.
        """
        blocks = range(self.model.n_layers) if layers is None else layers
        ks = self.ks if ks is None else ks
        cells = grid(method, blocks, ks=ks, positions=[positions], strengths=strengths, reads=[read])
        return self.table(cells, best=best)

    @cached_property
    def ks(self) -> list[int]:
        """Numbers of principal components that a sweep tries by default."""
        return possible_ks(self.model, self.data)

    def depths(
        self, best: int, *, others: Sequence[int] | None = None, k: int = 2, positions: str = "last_prompt"
    ) -> pd.DataFrame:
        """PCA-OT at one block, at that block with each of ``others``, and at all blocks, re-fitted in sequence.

        ``others`` defaults to every other block.
        """
        best, k = int(best), int(k)  # as they come out of a table
        others = [int(i) for i in (range(self.model.n_layers) if others is None else others) if i != best]
        sets = [(best,), *(tuple(sorted((best, i))) for i in others), tuple(range(self.model.n_layers))]
        return self.table([Cell("pca_ot", layers, k, positions) for layers in sets])

    def refitted(self, seed: int) -> Sweeper:
        """The same sweep with edits fitted on prompts drawn anew (``AblationData.resampled``), kept in the same store.

        Prompts, judge and cheap score are the same.
        """
        other = copy.copy(self)
        other.data, other.screen = self.data.resampled(seed), self.screen
        other.fitter = self.fitter.on(other.data)
        other.about = self.about | other.data.hashes() | {"fit_seed": seed}
        return other

    def over_fits(self, cells: Sequence[Cell], seeds: Sequence[int] = (0, 1, 2), **options: Any) -> pd.DataFrame:
        """The table of these cells once a seed, with its column ``fit_seed``; see ``paired.over_fits``."""
        return pd.concat([self.refitted(seed).table(cells, **options) for seed in seeds], ignore_index=True)

    def table(self, cells: Sequence[Cell], *, best: int | None = None, extrapolate: bool = False) -> pd.DataFrame:
        """One row a cell; what the store holds is not computed again.

        Args:
            cells: edits, in any order.
            best: answers are generated only for that many cells of each method and edited position, those that the
                cheap score puts first; None generates for all. Where a cell has no cheap score it is generated too.
            extrapolate: allow strengths outside [0, 1].

        Raises ReplibError as ``cells.checked``, before anything is computed.
        """
        cells = checked(cells, self.model, self.data, extrapolate=extrapolate)
        self._fill(cells, (FIRST_STAGE, ANSWERS_STAGE) if best is None else (FIRST_STAGE,))
        if best is not None:
            self._fill(self.shortlist(cells, best), (ANSWERS_STAGE,))
        return self._known(cells)

    def outcomes(self, cells: Sequence[Cell], *, extrapolate: bool = False) -> list[str]:
        """Outcomes of the scored prompts under each cell, a letter a prompt, without the cheap score; see ``table``.

        Edits that no cell describes are asked by ``answers.outcomes``.
        """
        cells = checked(cells, self.model, self.data, extrapolate=extrapolate)
        self._fill(cells, (ANSWERS_STAGE,))
        return [self._row(cell, ANSWERS_STAGE)["outcomes"] for cell in cells]

    def damage(self, cells: Sequence[Cell], gauge: DamageMeter, *, extrapolate: bool = False) -> pd.DataFrame:
        """Damage of each cell by ``gauge``, a row a metric; stored as the rows of ``table`` are."""
        cells = checked(cells, self.model, self.data, extrapolate=extrapolate)
        for cell in progress([c for c in cells if self._key(c, gauge.key) not in self.rows], "damage"):
            found = gauge(bound(self.model, self.fitted(cell)), positions=cell.positions)
            self.rows.put(self._key(cell, gauge.key), {"damage": found.to_dict("records")})
        facts = [{"model": self.about["model"], "layer": cell.layers[0]} | cell.facts() for cell in cells]
        found = [self._row(cell, gauge.key)["damage"] for cell in cells]
        return pd.DataFrame([fact | row for fact, rows in zip(facts, found, strict=True) for row in rows])

    def missing(self, cells: Sequence[Cell], stages: _Stages) -> list[tuple[_Stages, list[Cell]]]:
        """Cells by pass, and what each pass still has to find: neighbours edited at the same tokens share one."""
        lacking = [(cell, tuple(s for s in stages if self._key(cell, s) not in self.rows)) for cell in cells]
        found = []
        alike = lambda x: (x[0].positions, x[0].prefilled, x[1])  # noqa: E731
        for (*_, stage), group in groupby((x for x in lacking if x[1]), key=alike):
            own = list(dict.fromkeys(cell for cell, _ in group))
            room = min(self.scored.room, self.neutral.room) if FIRST_STAGE in stage else self.scored.room
            found += [(stage, own[i : i + room]) for i in range(0, len(own), room)]
        return found

    @property
    def scored(self) -> EditedGeneration:
        """Generation of answers to the scored prompts."""
        return self.answers.scorer

    def score(self, cells: Sequence[Cell], stages: _Stages = (FIRST_STAGE, ANSWERS_STAGE)) -> list[dict[str, dict]]:
        """Results of each edit, by stage, from one pass: cells of the same edited tokens, all prefilled or none."""
        positions, rows = cells[0].positions, [dict[str, dict]() for _ in cells]
        edits = [{positions: self.fitted(cell)} for cell in cells]
        asked = self.prefilled if cells[0].prefilled else self.answers
        first, answers = asked.scorer.run(edits, length=None if ANSWERS_STAGE in stages else 1)
        if FIRST_STAGE in stages:
            neutral = self.neutral.run(edits)[0]
            for cell, row, logits, moved in zip(cells, rows, first, neutral, strict=True):
                row[FIRST_STAGE] = self.screen.row(logits, positions) if cell.screened else dict.fromkeys(SCORE)
                row[FIRST_STAGE] |= self._moved(moved, positions) | self.fitter.facts[cell]
        if ANSWERS_STAGE in stages:
            for row, texts in zip(rows, answers, strict=True):
                outcomes = self.judge(self.data.scored, texts)
                row[ANSWERS_STAGE] = rates(outcomes) | {"outcomes": encode_outcomes(outcomes)}
        return rows

    def fitted(self, cell: Cell) -> SiteEdits:
        """The edit of a cell, without the warning for a K that misses the mean gap: the table has a row for it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return self.fitter.edits(cell)

    def _moved(self, logits: Float[Tensor, "prompts vocab"], positions: str) -> dict[str, float | int | None]:
        kl = None if positions in LATER else token_kl(self.reference, logits).mean().item()
        return {"kl": kl, "n_kl": len(self.data.neutral)}

    def _fill(self, cells: Sequence[Cell], stages: _Stages) -> None:
        for lacking, some in progress(self.missing(cells, stages), f"{self.about['model']}, {stages[-1]}"):
            for cell, rows in zip(some, self.score(some, lacking), strict=True):
                for stage, row in rows.items():
                    self.rows.put(self._key(cell, stage), row)

    def shortlist(self, cells: Sequence[Cell], best: int) -> list[Cell]:
        """The best of each method and edited position by cheap score, and all that have none; their score is known."""
        table = self._known(cells).assign(place=range(len(cells)))
        first = ordered(table, "cheap").groupby(["method", "positions"], sort=False).head(best)
        return [cells[i] for i in sorted([*first.place, *table.place[table.log_odds.isna()]])]

    def _known(self, cells: Sequence[Cell]) -> pd.DataFrame:
        rows = [self._facts(c) | _NOT_MEASURED | self._row(c, FIRST_STAGE) | self._row(c, ANSWERS_STAGE) for c in cells]
        read = pd.Series([c.read for c in cells], dtype=object)  # neither NaN for None nor floats beside it
        table = pd.DataFrame(rows).drop(columns="key").astype(dict.fromkeys(_NUMBER_COLUMNS, float)).assign(read=read)
        prefilled = [c.prefilled for c in cells]
        return table.assign(prefilled=prefilled) if any(prefilled) else table

    def _row(self, cell: Cell, stage: str) -> dict[str, Any]:
        return self.rows.rows.get(self._key(cell, stage), {})

    def _facts(self, cell: Cell) -> dict[str, Any]:
        place = {"layers": list(cell.layers), "layer": cell.layers[0], "depth": self.model.n_layers}
        return self.about | cell.facts() | place | self.data.counts() | {"n": len(self.data.scored)}

    def _key(self, cell: Cell, stage: str) -> str:
        return key_of(self._facts(cell) | self.identity | {"stage": stage})


def sweep_layers(
    model: ChatModel, data: AblationData, judge: Judge, method: str = "pca_ot", **options: Any
) -> pd.DataFrame:
    """One edit at one block at a time, re-fitted on this very model, for every block and every K.

    Options are those of ``Sweeper.layers``: ``ks``, ``layers``, ``positions``, ``strengths``, ``read``, ``best``.

    Returns:
        One row a cell: model, method, layers, k, positions, strength, read, depth of the model, prompts a class that
        fitted it (fewer than were given, where answers end too early); the cheap score: ``log_odds`` with its interval,
        each prompt's, the share of prompts ``turned`` (below 0), and the share of refusals that its tokens cover;
        ``kl`` (nats, first answer token, harmless prompts); n, attack success (``compliance``) with its Wilson 95 %
        interval, refusal and degenerate shares, and a letter an answer (``outcomes``). What was not generated, or does
        not exist, is NaN.
    """
    return Sweeper(model, data, judge).layers(method, **options)
