"""Prompts and cells of an ablation, and the edits fitted for them, block after block."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import pandas as pd

from replib.ablation.refusal_direction import selected_direction
from replib.ablation.refusal_score import LATER, RefusalTokens, filtered_prompts
from replib.activations.capture import capture
from replib.activations.store import Activations
from replib.core.errors import ReplibError
from replib.core.storage import content_hash
from replib.data.prompts import Prompt
from replib.edits.apply import POSITIONS, applied, bound
from replib.edits.methods import Method, SiteEdits, everywhere, fit_edit, method_of
from replib.models.chat_model import ChatModel, check_layers
from replib.models.tokens import Position, check_positions
from replib.transport.affine import AffineEdit, check_strength

log = logging.getLogger(__name__)


_ActivationPair = tuple[Activations, Activations]  # harmful, harmless


@dataclass(frozen=True)
class AblationData:
    """Prompts that fit an edit, and others that score it."""

    harmful: Sequence[str]
    """Source of the transport: fit split."""
    harmless: Sequence[str]
    """Target of the transport: fit split."""
    scored: Sequence[Prompt]
    """Harmful prompts on which attack success is counted: val to choose, test to report."""
    neutral: Sequence[str]
    """Harmless prompts on which the first-token KL to the unedited model is measured."""
    answers: tuple[Sequence[str], Sequence[str]] | None = None
    """Forced answers to the harmful and the harmless fit prompts; None reads the model's own answers."""
    openings: Sequence[str] = ()
    """First words of each scored answer under a ``prefilled`` cell."""

    def __post_init__(self) -> None:
        for name in ("harmful", "harmless", "scored", "neutral"):
            if not getattr(self, name):
                raise ReplibError(f"No {name} prompts: an ablation needs both classes to fit and prompts to score.")
        if shared := {p.text for p in self.scored} & set(self.harmful):
            raise ReplibError(f"{len(shared)} scored prompts fit the edits, for example {min(shared)!r}: split them.")

    def filtered(self, model: ChatModel, tokens: RefusalTokens) -> AblationData:
        """The same data, fitted on harmful prompts that the model refuses and harmless prompts that it answers.

        Raises ReplibError where too few are left.
        """
        left = filtered_prompts(model, self.harmful, self.harmless, tokens)
        return replace(self, harmful=left.harmful, harmless=left.harmless)

    def resampled(self, seed: int) -> AblationData:
        """The same data, fitted on a bootstrap sample of each class."""
        draw = random.Random(seed)
        drawn = [draw.choices(range(len(x)), k=len(x)) for x in (self.harmful, self.harmless)]
        harmful, harmless = _taken((self.harmful, self.harmless), drawn)
        return replace(self, harmful=harmful, harmless=harmless, answers=self.answers and _taken(self.answers, drawn))

    def counts(self) -> dict[str, int]:
        """Fit prompts of each class, after any filter."""
        return {"n_harmful": len(self.harmful), "n_harmless": len(self.harmless)}

    def hashes(self) -> dict[str, str]:
        """Hashes that identify the prompts in a table."""
        fit = content_hash([*self.harmful, "|", *self.harmless])
        forced = {"answers": content_hash([*self.answers[0], "|", *self.answers[1]])} if self.answers else {}
        begun = {"openings": content_hash([*self.openings])} if self.openings else {}
        scored = {"scored": content_hash([*self.scored]), "neutral": content_hash([*self.neutral])}
        return {"fit": fit} | scored | forced | begun


def _taken(lists: tuple[Sequence[str], Sequence[str]], places: Sequence[Sequence[int]]) -> tuple[list[str], list[str]]:
    one, other = ([texts[i] for i in at] for texts, at in zip(lists, places, strict=True))
    return one, other


class Cell(NamedTuple):
    """One edit of a sweep, of one or several blocks."""

    method: str | Method
    """Tables and stores take names alone."""
    layers: tuple[int, ...]
    """Ascending. Blocks to choose among, for a method that is ``selected``."""
    k: int
    """Principal components; 0 for a method without."""
    positions: str
    """Edited tokens; later blocks are fitted with the earlier edits acting there."""
    strength: float = 1.0
    read: Position | None = None
    """Position whose activations fit the edit; None is the choice of the method's source."""
    prefilled: bool = False
    """Whether each answer begins with its opening of ``AblationData.openings``."""

    @property
    def how(self) -> Method:
        """The method, with the position that fits it."""
        method = method_of(self.method)
        return method if self.read is None else replace(method, read=self.read)

    @property
    def screened(self) -> bool:
        """Whether the first token of the answer shows the effect of the edit."""
        return self.positions not in LATER and not self.prefilled

    def facts(self) -> dict[str, Any]:
        """Columns of a table; ``prefilled`` only where it is true, which keeps the keys of older stores."""
        return {name: value for name, value in self._asdict().items() if name != "prefilled" or value}


class Fitter:
    """Fits edits of one model; activations of the unedited model are captured once for all blocks.

    Args:
        model: the model to edit.
        data: prompts of both classes.
        layers: blocks of the cells to come.
        batch_size: largest number of prompts in one forward pass.
        answer: tokens of the model's own answer, under the edits already in place, over which ``response`` is a mean;
            unused with forced answers. An integer position from 0 on lies in such an answer too. Prompts with a
            shorter answer are left out, with a warning in the log; ``facts`` counts the prompts that fit.
    """

    def __init__(
        self, model: ChatModel, data: AblationData, layers: Sequence[int], *, batch_size: int = 64, answer: int = 24
    ):
        self.model, self.data, self.layers = model, data, check_layers(model, layers)
        self.batch_size, self.answer = batch_size, answer
        self._read: dict[tuple[Position, str], _ActivationPair] = {}
        self._under: tuple[Cell | None, _ActivationPair | None] = (None, None)  # of edited models only the latest
        self.facts: dict[Cell, dict[str, Any]] = {}
        """Prompts of each class behind the last block of each fit, and the choice of a selected direction."""

    def on(self, data: AblationData) -> Fitter:
        """A fitter of the same blocks on other prompts."""
        return Fitter(self.model, data, self.layers, batch_size=self.batch_size, answer=self.answer)

    def edits(self, cell: Cell) -> SiteEdits:
        """The edits at strength, each block's fitted with the earlier ones active; not bound to the model.

        A method that is not ``sequential`` is fitted at all blocks on the unedited model.

        Raises ReplibError as ``fit_edit``, ``capture`` and ``selected_direction``, and where the answers to fewer than
        two prompts of a class reach the position that is read.
        """
        if cell.how.selected:
            return {key: edit * cell.strength for key, edit in self._selected(cell).items()}
        *before, layer = cell.layers
        earlier = cell._replace(layers=tuple(before))
        edits = self.edits(earlier) if before else {}
        pair = self._edited(earlier, edits) if edits and cell.how.sequential else self.activations(cell.how)
        source, target = (x[layer] for x in pair)
        self.facts[cell] = {"n_harmful": len(source), "n_harmless": len(target)}
        fitted = fit_edit(cell.how, source, target, layer, k=max(cell.k, 1), depth=self.model.n_layers)
        return edits | {key: edit * cell.strength for key, edit in fitted.items()}

    def activations(self, method: Method) -> _ActivationPair:
        """Harmful and harmless activations of the unedited model, where a method reads."""
        if (method.read, method.site) not in self._read:
            self._read[method.read, method.site] = self._captured(method, self.layers)
        return self._read[method.read, method.site]

    def _selected(self, cell: Cell) -> SiteEdits:
        chosen = selected_direction(self.model, self.data.harmful, self.data.harmless, cell.layers)
        place = {"layer": chosen.layer, "token": chosen.position, "passed": chosen.passed}
        self.facts[cell] = self.data.counts() | place
        return everywhere(AffineEdit.ablation(chosen.r), self.model.n_layers)

    def _edited(self, active: Cell, edits: SiteEdits) -> _ActivationPair:
        cell, pair = self._under
        if pair is None or cell != active:
            with applied(self.model, edits, positions=active.positions):
                pair = self._captured(active.how, [i for i in self.layers if i > active.layers[-1]])
            self._under = active, pair
        return pair

    def _captured(self, method: Method, layers: Sequence[int]) -> _ActivationPair:
        span = method.read == "response"
        written = self.answer if span else max(0, method.read + 1) if isinstance(method.read, int) else 0
        options: dict[str, Any] = {"site": method.site, "layers": layers, "positions": method.read}
        options |= {"batch_size": self.batch_size, "short": "leave_out" if written else "refuse"}
        options |= {} if self.data.answers else {"max_new_tokens": written}
        forced = self.data.answers or (None, None)
        texts = zip((self.data.harmful, self.data.harmless), forced, strict=True)
        harmful, harmless = (capture(self.model, x, responses=answers, **options) for x, answers in texts)
        _check_reached("harmful", len(harmful), len(self.data.harmful), method.read)
        _check_reached("harmless", len(harmless), len(self.data.harmless), method.read)
        return harmful, harmless


def _check_reached(name: str, left: int, asked: int, position: Position) -> None:
    if left == asked:
        return
    said = f"The answers to {asked - left} of {asked} {name} prompts end before position {position!r}"
    if left < 2:
        raise ReplibError(f"{said}, so {left} are left to fit an edit, and two are needed: read an earlier position.")
    log.warning("%s: these prompts fit no edit.", said)


def fit_edits(
    model: ChatModel,
    method: str | Method,
    data: AblationData,
    layers: Sequence[int],
    *,
    k: int = 2,
    positions: str | None = None,
    strength: float = 1.0,
) -> SiteEdits:
    """Edits at several blocks, each fitted with the earlier ones active: it meets what it will be applied to.

    ``positions``: where they will act, by default as in the method's source. A method that is not ``sequential`` is
    fitted at all blocks at once, on the unedited model. ``strength`` scales each, also while later ones are fitted.

    Raises ReplibError as ``Fitter.edits``, and for a strength outside [0, 1].
    """
    check_strength(strength, "to go beyond, multiply the edits")
    method = method_of(method)
    blocks = sorted(set(check_layers(model, layers)))
    cell = Cell(method, tuple(blocks), k, positions or method.positions, strength)
    return bound(model, Fitter(model, data, blocks).edits(cell))


_KS = (1, 2, 4, 8, 16)


def cells_of(table: pd.DataFrame) -> list[Cell]:
    """The cells of a table's rows."""
    rows = table.assign(prefilled=table["prefilled"].eq(True) if "prefilled" in table else False)
    columns = [rows[name] for name in Cell._fields]
    return [
        Cell(method, tuple(map(int, layers)), int(k), positions, float(strength), read, prefilled)
        for method, layers, k, positions, strength, read, prefilled in zip(*columns, strict=True)
    ]


def grid(
    methods: str | Sequence[str],
    layers: Sequence[int],
    *,
    ks: Sequence[int] = (2,),
    positions: Sequence[str | None] = (None,),
    strengths: Sequence[float] = (1.0,),
    reads: Sequence[Position | None] = (None,),
) -> list[Cell]:
    """Every combination once, one block each; K only for methods with one, None is the choice of the method's source.

    A method that is ``selected`` has one cell for all blocks, its candidates.
    """
    names = [methods] if isinstance(methods, str) else methods
    cells = [
        Cell(name, blocks, k, where or how.positions, strength, read)
        for name, how in zip(names, map(method_of, names), strict=True)
        for where, read, strength, blocks, k in product(
            positions, reads, strengths, _candidates(how, layers), ks if how.ranked else [0]
        )
    ]
    return list(dict.fromkeys(cells))


def _candidates(method: Method, layers: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(layers)] if method.selected else [(layer,) for layer in layers]


def checked(cells: Sequence[Cell], model: ChatModel, data: AblationData, *, extrapolate: bool = False) -> list[Cell]:
    """The same cells with layers from 0 upwards, before anything is paid for them.

    ``extrapolate`` allows strengths outside [0, 1], where an edit moves activations back or beyond its target.

    Raises:
        ReplibError: unknown method, positions or layer; K above the rank that the prompts give, or of a method that
            has none; a strength outside [0, 1]; several blocks for a method that acts at all of them; a prefilled cell
            without openings.
    """
    most = min(len(data.harmful) - 1, len(data.harmless) - 1, model.d_model)
    for cell in cells:
        _check_method(cell, most)
        if cell.prefilled and not data.openings:
            raise ReplibError("A prefilled cell needs the beginnings of answers: set AblationData.openings.")
        check_strength(cell.strength, "extrapolate=True goes beyond, finitely far", extrapolate=extrapolate)
    return [cell._replace(layers=tuple(sorted(set(check_layers(model, cell.layers))))) for cell in cells]


def check_cell_names(
    methods: Sequence[str | Method], positions: Sequence[str | None] = (), reads: Sequence[Position | None] = ()
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
    check_cell_names([cell.method], [cell.positions], [cell.read])
    if method.everywhere and not method.selected and len(cell.layers) > 1:
        raise ReplibError(f"{cell.method} acts at every block, wherever it was fitted: give it one block, not several.")
    if not method.ranked and cell.k:
        raise ReplibError(f"{cell.method} has no K, but {cell.k} was given: K = 0 says so.")
    if method.ranked and not 1 <= cell.k <= most:
        raise ReplibError(
            f"K = {cell.k} of {cell.method}: these prompts and this width fit 1 to {most} axes. "
            "Give more prompts of both classes, or a lower K."
        )


def possible_ks(model: ChatModel, data: AblationData) -> list[int]:
    """Numbers of components among 1, 2, 4, 8 and 16 that the prompts can fit."""
    return [k for k in _KS if k < min(len(data.harmful), len(data.harmless), model.d_model)]


def window(depth: int) -> tuple[int, int] | None:
    """First and last block between 40 and 60 % of the depth, where arXiv 2603.04355 chose its blocks; None if none."""
    first, last = -(-2 * depth // 5), 3 * depth // 5
    return (first, last) if first <= last else None
